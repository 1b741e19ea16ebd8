"""A sparse layer of a published shape, jmoe's beside other libraries', in one run.

  python -m experiments.benchmarks.peers --shape qwen3

Random bfloat16 operands, skewed routing that is given (`benchmarks.shapes`), SwiGLU
experts.  Forward, and forward with the gradients of the input, the matrices and the
routing weights.  The bound is the rate of 8192^3 products, measured between the rows;
FLOPs are those of the choices, so that padding counts as lost, and drops as done.
Each row's output is compared with float32 for four tokens.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import statistics
import sys
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
  add("--legs", action="store_true", help="also the six products of a layer alone")
  add("--table", type=int, default=0, metavar="N", help="operations to list")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  if arguments.table:
    tracing.prepare()
  import jax

  from experiments.benchmarks.peers import legs, ours

  shape = shapes.SHAPES[arguments.shape]
  expert_TK, weight_TK = shapes.routing(shape)
  params, x_TD = ours.operands(shape)
  rows: list[dict[str, Any]] = []
  for name, factor in (("jmoe dropless", None), ("jmoe capacity 1.25", 1.25)):
    call = ours.layer(shape, capacity_factor=factor)
    row, step, operands = _row(name, shape, call, params, x_TD, weight_TK, expert_TK)
    _show(row)
    if arguments.table:
      row["table"] = tracing.shown(step, operands, arguments.table)
    rows.append(row)
  found = {
    "shape": arguments.shape,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "rows": rows,
  }
  if arguments.legs:
    bound = shapes.ceiling()
    found["legs"] = legs.measured(shape, expert_TK)
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


def _row(name, shape, call, params, x_TD, weight_TK, expert_TK) -> Any:
  """Time, memory and error of one implementation; its step with its operands."""
  import time

  import jax
  import jax.numpy as jnp

  from experiments.benchmarks.peers import ours

  weight, expert = jnp.asarray(weight_TK), jnp.asarray(expert_TK)
  dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)

  def forward(params, x, weight):
    return call(params, x, weight, expert)

  def both(params, x, weight, dy):
    y, pull = jax.vjp(forward, params, x, weight)
    return y, pull(dy)

  bound = shapes.ceiling()
  row: dict[str, Any] = {"name": name, "ceiling": bound, "drops": "capacity" in name}
  for kind, function, operands in (
    ("forward", forward, (params, x_TD, weight)),
    ("step", both, (params, x_TD, weight, dy_TD)),
  ):
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    row[f"{kind}_compile_s"] = time.perf_counter() - begin
    times = shapes.seconds(lambda: compiled(*operands))  # noqa: B023
    memory: Any = compiled.memory_analysis()
    flops = shape.flops(backward=kind == "step")
    row[f"{kind}_ms"] = [1e3 * t for t in times]
    row[f"{kind}_tflops"] = flops / statistics.median(times) / 1e12
    row[f"{kind}_share"] = flops / statistics.median(times) / bound
    row[f"{kind}_gb"] = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
    ) / 1e9
  y_TD = jax.jit(forward)(params, x_TD, weight)
  row["error"] = ours.error(params, x_TD, y_TD, weight_TK, expert_TK)
  return row, compiled, operands


def _show(row: dict[str, Any]) -> None:
  print(
    f"{row['name']:<24}"
    + "".join(
      f"{statistics.median(row[f'{kind}_ms']):9.2f} ms"
      f"{row[f'{kind}_tflops']:7.0f} TFLOP/s{row[f'{kind}_share']:7.3f}"
      for kind in ("forward", "step")
    )
    + f"{row['step_gb']:7.1f} GB, error {row['error']:.4f}, "
    f"compiled in {row['step_compile_s']:.0f} s",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
