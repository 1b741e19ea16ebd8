"""What bounds a sparse layer's step: hardware counters, and the chip's clock and power.

  python -m experiments.benchmarks.counters --shape qwen3

Runs forward and backward passes under Nsight Compute (`ncu`) and prints for each kernel
its cycles, how busy memory and cache were, and for products the share of the cycles
that tensor cores need at least, whatever the clock is.  Then the layer, and a square
product that nothing but tensor cores bounds, each for some seconds, and what clock and
power `nvidia-smi` reads meanwhile.  The tool must be there; its clock control stays
off.

Exit codes: 0 done, 2 bad arguments, 4 a tool is missing or failed.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes
from experiments.parser import Parser

METRICS = {
  "cycles": "sm__cycles_elapsed.max",
  "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
  "cache": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
  "GB": "dram__bytes.sum",
  "registers": "launch__registers_per_thread",
}
# Kernel -> how many of the layer's products its launches make; each is as large.
PRODUCTS = {
  "ffn_hidden": 2,
  "ffn_back": 1,
  "grouped_matmul": 1,
  "grouped_matmul_transposed": 2,
  "grouped_matmul_matrices": 3,
}
_PASSES = 2  # of `--once`
_FLOPS = 4096  # of a Hopper multiprocessor in a cycle, bfloat16
_GPU_READS = ("power.draw", "clocks.sm", "clocks_event_reasons.sw_power_cap")


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.counters",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--seconds", type=float, default=4.0, help="of each loop; 4")
  add("--once", action="store_true", help="two passes and nothing else: what ncu runs")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  if arguments.once:
    run, _ = step(arguments.shape)
    for _ in range(_PASSES):
      run()
    return 0
  for tool in ("ncu", "nvidia-smi"):
    if not shutil.which(tool):
      print(f"error: no `{tool}` on the PATH", file=sys.stderr)
      return 4
  found: dict[str, Any] = {
    "shape": arguments.shape,
    "command": f"python -m experiments.benchmarks.counters --shape {arguments.shape}",
  }
  found["kernels"] = counted(arguments.shape)
  for row in found["kernels"]:
    print(
      f"{row['name'][:44]:<46}{row['count']:>3} x {row['cycles'] / 1e6:8.3f} Mcycles  "
      f"tensor {100 * row['tensor']:5.1f}%  memory {row['memory']:5.1f}%  "
      f"cache {row['cache']:5.1f}%  {row['GB'] / 1e9:6.2f} GB  "
      f"{row['registers']:.0f} registers",
      flush=True,
    )
  found["loops"] = loops(arguments.shape, arguments.seconds)
  for name, row in found["loops"].items():
    print(
      f"{name:<16}{row['ms']:8.2f} ms {row['tflops']:6.0f} TFLOP/s  "
      f"{row['watts']:5.0f} W  {row['mhz']:5.0f} MHz  "
      f"held by its power limit in {row['capped']:.0%} of {row['reads']} readings",
      flush=True,
    )
  if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  return 0 if found["kernels"] else 4


def step(name: str) -> tuple[Any, float]:
  """(a call of one forward and backward pass that waits for it, its FLOPs)."""
  import jax
  import jax.numpy as jnp

  from experiments.benchmarks.peers import ours

  shape = shapes.SHAPES[name]
  params, x_TD = ours.operands(shape)
  expert_TK, weight_TK = shapes.routing(shape)
  layer: Any = ours.layer(shape)

  @jax.jit
  def both(params, x_TD, weight_TK, dy_TD):
    def of(params, x_TD, weight_TK):
      return layer(params, x_TD, weight_TK, jnp.asarray(expert_TK))

    y_TD, back = jax.vjp(of, params, x_TD, weight_TK)
    return y_TD, back(dy_TD)

  dy_TD = jax.random.normal(jax.random.key(1), x_TD.shape, x_TD.dtype)
  operands = params, x_TD, jnp.asarray(weight_TK), dy_TD
  return lambda: jax.block_until_ready(both(*operands)), shape.flops(backward=True)


def counted(name: str) -> list[dict[str, Any]]:
  """Of our own kernels, slowest first: means over launches of one name."""
  command = ["ncu", "--csv", "--clock-control", "none", "--target-processes", "all"]
  command += ["--metrics", ",".join(METRICS.values()), "--print-units", "base"]
  # Others, XLA's own trials of products among them, would each be run several times.
  command += ["--kernel-name", "regex:mosaic|rows|home"]
  command += [sys.executable, "-m", "experiments.benchmarks.counters"]
  command += ["--shape", name, "--once"]
  from jmoe.kernels import hopper

  done = subprocess.run(command, capture_output=True, text=True)
  text = done.stdout
  begin = text.find('"ID"')
  if begin < 0:
    print(
      f"error: ncu printed no table: {text[-500:]} {done.stderr[-500:]}",
      file=sys.stderr,
    )
    return []
  launches: dict[str, dict[str, Any]] = {}
  for line in csv.DictReader(io.StringIO(text[begin:])):
    one = launches.setdefault(line["ID"], {"name": line["Kernel Name"]})
    value = line["Metric Value"].replace(",", "")
    one[line["Metric Name"]] = float(value) if value else 0.0
  by_name: dict[str, list[dict[str, Any]]] = {}
  for one in launches.values():
    by_name.setdefault(one["name"], []).append(one)
  shape, rows = shapes.SHAPES[name], []
  sms = hopper.multiprocessors()
  for kernel, those in by_name.items():
    mean = {
      short: statistics.fmean(one.get(metric, 0.0) for one in those)
      for short, metric in METRICS.items()
    }
    products = PRODUCTS.get(kernel.removesuffix("_mosaic_gpu_kernel"), 0)
    needed = products * shape.flops(backward=False) / 3 / (sms * _FLOPS)
    # Large arrays come in pieces, a launch for each.
    mean["tensor"] = needed / max(1.0, mean["cycles"] * len(those) / _PASSES)
    rows.append({"name": kernel, "count": len(those), **mean})
  return sorted(rows, key=lambda row: -row["cycles"] * row["count"])[:24]


def loops(name: str, seconds: float) -> dict[str, dict[str, float]]:
  """The layer and a square product, each for some seconds, as the chip runs them."""
  import jax
  import jax.numpy as jnp

  layer, flops = step(name)
  square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
  multiply = jax.jit(jnp.matmul)
  calls = {
    "layer": (layer, flops),
    "square product": (
      lambda: jax.block_until_ready([multiply(square, square) for _ in range(10)]),
      10 * 2.0 * 8192**3,
    ),
  }
  found = {}
  for label, (call, work) in calls.items():
    call()
    reader = subprocess.Popen(
      ["nvidia-smi", f"--query-gpu={','.join(_GPU_READS)}", "-lms", "100"]
      + ["--format=csv,noheader,nounits"],
      stdout=subprocess.PIPE,
      text=True,
    )
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
      call()
      count += 1
    took = (time.perf_counter() - begin) / count
    reader.terminate()
    lines = [line.split(", ") for line in reader.communicate()[0].splitlines()]
    reads = [line for line in lines if len(line) == len(_GPU_READS)][len(lines) // 3 :]
    found[label] = {
      "ms": took * 1e3,
      "tflops": work / took / 1e12,
      "watts": statistics.median(float(line[0]) for line in reads),
      "mhz": statistics.median(float(line[1]) for line in reads),
      "capped": statistics.fmean(line[2].strip() == "Active" for line in reads),
      "reads": len(reads),
    }
  return found


if __name__ == "__main__":
  sys.exit(main())
