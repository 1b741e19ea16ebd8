"""A sparse layer's forward products in eight bits beside those in bfloat16, on Hopper.

  python -m experiments.benchmarks.eight_bit --shape qwen3

The same kernels read float8_e4m3fn with one scale for each row and one for each column
of an expert's matrix; both are applied to the float32 sums.  That is less work than a
scale for every 128 of the contracted dimension: what it gains bounds those.  Matrices
are quantised and transposed beforehand (wgmma reads eight-bit operands along the
contracted dimension alone); rows are quantised in the timed program.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes
from experiments.parser import Parser

LARGEST = 448.0  # of float8_e4m3fn


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.eight_bit",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--rounds", type=int, default=5)
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  import jax

  shape = shapes.SHAPES[arguments.shape]
  calls, errors = programs(shape)
  times: dict[str, list[float]] = {name: [] for name in calls}
  ceilings, order = [], random.Random(0)
  for _ in range(arguments.rounds):
    ceilings.append(shapes.ceiling(repeats=1))
    for name in order.sample(list(calls), len(calls)):
      (took,) = shapes.seconds(calls[name], repeats=1, inner=10)
      times[name].append(1e3 * took)
  for name, row in times.items():
    error = f"  error {errors[name]:.4f}" if name in errors else ""
    print(
      f"{name:<28}{statistics.median(row):8.3f} ms ({min(row):.3f} to {max(row):.3f})"
      + error
    )
  print(f"ceiling of bfloat16 {statistics.median(ceilings) / 1e12:.0f} TFLOP/s")
  if arguments.out:
    found = {
      "shape": arguments.shape,
      "command": "python -m experiments.benchmarks.eight_bit "
      f"--shape {arguments.shape} --rounds {arguments.rounds}",
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "ceilings_tflops": [rate / 1e12 for rate in ceilings],
      "ms": times,
      "errors": errors,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  wrong = [name for name, error in errors.items() if not error < 0.1]
  if wrong:
    print(f"error: wrong result of {'; '.join(wrong)}", file=sys.stderr)
    return 3
  return 0


def quantised(x: Any, axis: int) -> tuple[Any, Any]:
  """(x in eight bits, f32 scales along the other dimensions); their product is x."""
  import jax.numpy as jnp

  most = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
  scale = jnp.where(most > 0, most / LARGEST, 1.0)
  return (x / scale).astype(jnp.float8_e4m3fn), jnp.squeeze(scale, axis)


def products(groups: Any, x_RD: Any, scale_R: Any, w: Any, w_scales: Any) -> Any:
  """One product of eight-bit rows, or two with SiLU between; bfloat16 `[R,F]`.

  Args:
    groups: aligned to `hopper.BLOCK`.
    x_RD: rows.
    scale_R: f32 of each row.
    w: one or two arrays [E,F,D].
    w_scales: as many f32[E,F].
  """
  import jax
  import jax.numpy as jnp

  from jmoe.kernels import hopper as chip, hopper_rows as by_rows
  from jmoe.kernels.hopper_tiles import choose

  (R, D), F = x_RD.shape, w[0].shape[1]
  gated = len(w) == 2
  tile = choose("hidden" if gated else "rows", width=F, depth=D, operands=1 + len(w))

  def multiply(place, tiles, totals):
    for total, right in zip(totals, tiles[1:], strict=True):
      by_rows.multiply(tile, place, total, tiles[0], right, transpose=True)

  def begin(place, others):
    row, *columns = others
    return [
      by_rows.values_of_rows(place, row),
      *(by_rows.values_of_columns(place, ref) for ref in columns),
    ]

  def finish(place, sums, begun, scratch, others, results):
    del others
    row, *columns = begun
    values = [
      total * by_rows.over_rows(row, total) * by_rows.over_columns(column, total)
      for total, column in zip(sums, columns, strict=True)
    ]
    y = values[0] * jax.nn.sigmoid(values[0]) * values[1] if gated else values[0]
    by_rows.store(y, scratch["staged"], place, results[0])

  (made,) = by_rows.row_kernel(
    groups,
    (scale_R, *(by_rows.whole_tiles(s, tile) for s in w_scales)),
    (x_RD,),
    w,
    tile=tile,
    transpose=True,
    sums=len(w),
    products=multiply,
    begin=begin,
    finish=finish,
    scratch={"staged": chip.staging(tile.own[0], jnp.bfloat16)},
    out=(chip.struct((R, F), jnp.bfloat16, x_RD),),
    name="eight_bit",
  )
  return made


def programs(shape: shapes.Shape) -> tuple[dict[str, Any], dict[str, float]]:
  """Calls by name, and relative errors against products of float32 in some blocks."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jmoe.kernels.grouped_ffn import activations, hopper_kernels
  from jmoe.kernels.grouped_matmul import hopper as kernels
  from jmoe.kernels.hopper import BLOCK
  from jmoe.types import Groups

  expert_TK, _ = shapes.routing(shape)
  loads = np.bincount(expert_TK.reshape(-1), minlength=shape.num_experts)
  padded = -(-loads // BLOCK) * BLOCK
  start = np.cumsum(padded) - padded
  groups = Groups(jnp.asarray(start, jnp.int32), jnp.asarray(loads, jnp.int32), BLOCK)
  D, F, R, E = shape.d_model, shape.d_ff, int(padded.sum()), shape.num_experts
  keys = jax.random.split(jax.random.key(0), 4)
  rows = jax.random.normal(keys[0], (R, D), jnp.bfloat16)
  gate, up = (
    jax.random.normal(key, (E, D, F), jnp.bfloat16) * D**-0.5 for key in keys[1:3]
  )
  down = jax.random.normal(keys[3], (E, F, D), jnp.bfloat16) * F**-0.5
  eight = jax.jit(lambda w: quantised(jnp.swapaxes(w, 1, 2), 2))
  matrices = [eight(w) for w in (gate, up, down)]

  def bfloat16(groups, x, gate, up, down):
    (hidden,) = hopper_kernels.hidden_kernel(
      groups,
      x,
      gate,
      up,
      ups=2,
      biased=False,
      activation=activations.silu,
      num_sms=None,
      hidden=False,
      product=True,
    )
    return hidden, kernels.rows(((hidden, down),), groups)

  def in_eight(groups, x, x_scale, gate, up, down):
    both = (gate[0], up[0]), (gate[1], up[1])
    hidden = products(groups, x, x_scale, *both)
    return hidden, products(groups, *quantised(hidden, 1), (down[0],), (down[1],))

  x8, x_scale = jax.jit(lambda x: quantised(x, 1))(rows)
  made = {
    "bfloat16": (bfloat16, (groups, rows, gate, up, down)),
    "eight bits": (in_eight, (groups, x8, x_scale, *matrices)),
    "eight bits, rows too": (
      lambda groups, x, *w: in_eight(groups, *quantised(x, 1), *w),
      (groups, rows, *matrices),
    ),
    "eight bits, down alone": (
      lambda groups, a, scale, w: products(groups, a, scale, (w[0],), (w[1],)),
      (groups, x8[:, :F], x_scale, matrices[2]),
    ),
    "bfloat16, down alone": (
      lambda groups, a, w: kernels.rows(((a, w),), groups),
      (groups, rows[:, :F], down),
    ),
  }
  calls = {}
  for name, (function, operands) in made.items():
    print(f"compiling {name}", file=sys.stderr, flush=True)
    compiled = jax.jit(function).lower(*operands).compile()
    calls[name] = lambda compiled=compiled, operands=operands: compiled(*operands)

  # The first block of every expert that has one, in float32.
  some = [(e, int(start[e])) for e in np.flatnonzero(loads)[:: max(1, E // 8)]]
  errors = {}
  for name in ("bfloat16", "eight bits", "eight bits, rows too"):
    found = jax.block_until_ready(calls[name]())[1]
    worst = 0.0
    for e, first in some:
      with jax.default_matmul_precision("highest"):
        x = rows[first : first + BLOCK].astype(jnp.float32)
        a = jax.nn.silu(x @ gate[e].astype(jnp.float32)) * (
          x @ up[e].astype(jnp.float32)
        )
        expected = (a @ down[e].astype(jnp.float32))[: int(loads[e])]
      got = found[first : first + BLOCK].astype(jnp.float32)[: int(loads[e])]
      error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
      worst = max(worst, float(error))
    errors[name] = worst
  return calls, errors


if __name__ == "__main__":
  sys.exit(main())
