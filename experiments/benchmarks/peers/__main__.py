"""A sparse layer of a published shape, jmoe's beside other libraries', in one run.

  python -m experiments.benchmarks.peers --shape qwen3

Random bfloat16 operands, skewed routing that is given (`benchmarks.shapes`), SwiGLU
experts.  Forward, and forward with the gradients of the input, the matrices and the
routing weights.  The bound is the rate of 8192^3 products, measured between the rows;
FLOPs are those of the choices, so that padding counts as lost, and drops as done.
Each row's output is compared with float32 for four tokens.

  jmoe dropless, jmoe capacity 1.25   the layer
  plain, jmoe's dot                   sort, three `jmoe.ragged_dot`, sort back, as other
                                      libraries' layers are; `--dense` adds jax's own

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes, tracing
from experiments.parser import Parser


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.peers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--rounds", type=int, default=5)
  add("--legs", action="store_true", help="also the six products of a layer alone")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--dense", action="store_true", help="jax's ragged_dot too: E times the work")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  if arguments.table:
    tracing.prepare()
  import jax

  import jmoe
  from experiments.benchmarks.peers import legs, ours

  shape = shapes.SHAPES[arguments.shape]
  routed = shapes.routing(shape)
  operands = ours.operands(shape)
  calls = {
    "jmoe dropless": ours.layer(shape),
    "jmoe capacity 1.25": ours.layer(shape, capacity_factor=1.25),
    "plain, jmoe's dot": ours.plain(shape, jmoe.ragged_dot),
  }
  if arguments.dense:
    calls["plain, jax's dot"] = ours.plain(shape, jax.lax.ragged_dot)
  rows = [_compiled(name, call, operands, routed) for name, call in calls.items()]
  ceilings = _timed(rows, arguments.rounds)
  for row in rows:
    _summed_up(row, shape, ceilings)
    _show(row)
    if arguments.table:
      step, given = row["calls"]["step"]
      row["table"] = tracing.shown(step, given, arguments.table)
  print(f"ceiling {statistics.median(ceilings) / 1e12:.0f} TFLOP/s")
  found = {
    "shape": arguments.shape,
    "command": f"python -m experiments.benchmarks.peers --shape {arguments.shape} "
    f"--rounds {arguments.rounds}{' --dense' * arguments.dense}",
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "ceilings_tflops": [rate / 1e12 for rate in ceilings],
    "rows": [{k: v for k, v in row.items() if k != "calls"} for row in rows],
  }
  if arguments.legs:
    bound = statistics.median(ceilings)
    found["legs"] = legs.measured(shape, routed[0])
    for name, rate in found["legs"].items():
      print(f"  {name:<12}{rate / 1e12:7.0f} TFLOP/s{rate / bound:7.3f}", flush=True)
  if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  wrong = [row["name"] for row in rows if not row["drops"] and row["error"] > 1e-2]
  if wrong:
    print(f"error: wrong result of {', '.join(wrong)}", file=sys.stderr)
    return 3
  return 0


def _compiled(name: str, call: Any, operands: Any, routed: Any) -> dict[str, Any]:
  """One implementation: its two functions, compiled, and how wrong it is."""
  import jax
  import jax.numpy as jnp

  from experiments.benchmarks.peers import ours

  params, x_TD = operands
  expert_TK, weight_TK = (jnp.asarray(a) for a in routed)
  dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)

  def forward(params, x, weight):
    return call(params, x, weight, expert_TK)

  def step(params, x, weight, dy):
    y, pull = jax.vjp(forward, params, x, weight)
    return y, pull(dy)

  row: dict[str, Any] = {"name": name, "drops": "capacity" in name, "calls": {}}
  inputs = (params, x_TD, weight_TK)
  for kind, function, given in (
    ("forward", forward, inputs),
    ("step", step, (*inputs, dy_TD)),
  ):
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*given).compile()
    row[f"{kind}_compile_s"] = time.perf_counter() - begin
    memory: Any = compiled.memory_analysis()
    row[f"{kind}_gb"] = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
    ) / 1e9
    row["calls"][kind] = compiled, given
    row[f"{kind}_ms"] = []
  compiled, given = row["calls"]["forward"]
  row["error"] = ours.error(params, x_TD, compiled(*given), routed[1], routed[0])
  return row


def _timed(rows: list[dict[str, Any]], rounds: int) -> list[float]:
  """Milliseconds into the rows; FLOP/s of square products before each of them.

  Everything is measured in turn, a tenth of a second at a time: a chip that has worked
  for long is slower than one that has rested, and so is its ceiling.
  """
  ceilings = []
  for n in range(rounds + 1):
    for row in rows:
      for kind, (compiled, given) in row["calls"].items():
        bound = shapes.ceiling(repeats=1)
        (once,) = shapes.seconds(lambda: compiled(*given), repeats=1, inner=2)  # noqa: B023
        inner = max(2, round(0.1 / once))
        (took,) = shapes.seconds(
          lambda: compiled(*given),  # noqa: B023
          repeats=1,
          inner=inner,
        )
        if n:  # the first round warms up
          ceilings.append(bound)
          row[f"{kind}_ms"].append(1e3 * took)
  return ceilings


def _summed_up(row: dict[str, Any], shape: Any, ceilings: list[float]) -> None:
  """Rates from the medians, and their share of the ceiling."""
  bound = statistics.median(ceilings)
  for kind in row["calls"]:
    flops = shape.flops(backward=kind == "step")
    rate = flops / statistics.median(row[f"{kind}_ms"]) * 1e3
    row[f"{kind}_tflops"] = rate / 1e12
    row[f"{kind}_share"] = rate / bound


def _show(row: dict[str, Any]) -> None:
  cells = []
  for kind in ("forward", "step"):
    times = row[f"{kind}_ms"]
    cells.append(
      f"{statistics.median(times):9.2f} ms ({min(times):.2f} to {max(times):.2f})"
      f"{row[f'{kind}_tflops']:7.0f} TFLOP/s{row[f'{kind}_share']:7.3f}"
    )
  print(
    f"{row['name']:<20}" + "".join(cells) + f"{row['step_gb']:7.1f} GB, "
    f"error {row['error']:.4f}, compiled in {row['step_compile_s']:.0f} s",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
