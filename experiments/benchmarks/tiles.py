"""Candidates for the table of Hopper's tiles, timed on a shape's six products.

  python -m experiments.benchmarks.tiles --shape qwen3

Each product of a sparse layer's step, forward and backward, made every way that fits.
Rounds take turns over all ways and a square product, whose rate is the bound; the
result of each is compared with that of the way the table chooses, which is the first.
Gradients of the hidden arrays are written over these, which must be copied here to be
there for the next call: "copies" is what that costs.
What wins by more than the spread belongs into `jmoe/kernels/hopper_tiles.py`, and all
figures into RESULTS.md.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes
from experiments.parser import Parser

FLIGHT = dict(in_flight=True)
PING_PONG = dict(in_flight=True, alternating=True)
TOGETHER = dict(in_flight=False, alternating=False)
BOTH = [{}, dict(cluster=2)]
ROWS = [
  *BOTH,
  *({**FLIGHT, **more} for more in BOTH),
  *(dict(cols=256, by_cols=False, **way) for way in ({}, FLIGHT)),
  dict(cols=128, **PING_PONG),
  *(dict(cols=192, stages=3, **PING_PONG, **more) for more in BOTH),
]
MATRICES = [
  *BOTH,
  *({**FLIGHT, **more} for more in BOTH),
  *(dict(band=band) for band in (4, 2)),
  dict(rows=256, cols=128, **FLIGHT),
  dict(cols=128, **PING_PONG),
]
HIDDEN = [
  *BOTH,
  *(dict(band=band) for band in (4, 16)),
  TOGETHER,
  dict(cols=64, **PING_PONG),
]
BACK = [
  *BOTH,
  *(dict(band=band) for band in (4, 16)),
  TOGETHER,
  *(dict(TOGETHER, cols=256, stages=3, in_flight=way) for way in (False, True)),
]
# FLOPs, the ways, and a function of operands for each way
Leg = tuple[float, list[dict[str, Any]], Callable[[dict[str, Any]], Any], tuple]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.tiles",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--legs", help="names of products, with commas between; all of them")
  add("--rounds", type=int, default=5)
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  import jax

  shape = shapes.SHAPES[arguments.shape]
  legs = products(shape)
  names = arguments.legs.split(",") if arguments.legs else list(legs)
  if unknown := sorted(set(names) - set(legs)):
    parser.error(f"--legs: {', '.join(unknown)}; known: {', '.join(legs)}")
  rows = _compiled({name: legs[name] for name in names})
  wrong = _checked(rows)
  ceilings = _timed(rows, arguments.rounds)
  bound = statistics.median(ceilings)
  for row in rows:
    if row["ms"]:
      rate = row["flops"] / statistics.median(row["ms"]) * 1e3
      row["tflops"], row["share"] = rate / 1e12, rate / bound
    _show(row)
  print(f"ceiling {bound / 1e12:.0f} TFLOP/s")
  if arguments.out:
    found = {
      "shape": arguments.shape,
      "command": f"python -m experiments.benchmarks.tiles --shape {arguments.shape} "
      f"--legs {','.join(names)} --rounds {arguments.rounds}",
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "ceilings_tflops": [rate / 1e12 for rate in ceilings],
      "rows": [{k: v for k, v in row.items() if k != "call"} for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
  if wrong:
    print(f"error: wrong result of {'; '.join(wrong)}", file=sys.stderr)
    return 3
  return 0


def products(shape: shapes.Shape) -> dict[str, Leg]:
  """By name: FLOPs, the ways, and a call of one way."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jmoe.kernels.grouped_ffn import activations, hopper_kernels as gated
  from jmoe.kernels.grouped_matmul import hopper as kernels
  from jmoe.kernels.hopper import BLOCK
  from jmoe.kernels.hopper_tiles import choose
  from jmoe.types import Groups

  expert_TK, _ = shapes.routing(shape)
  loads = np.bincount(expert_TK.reshape(-1), minlength=shape.num_experts)
  padded = -(-loads // BLOCK) * BLOCK
  start = np.cumsum(padded) - padded
  groups = Groups(jnp.asarray(start, jnp.int32), jnp.asarray(loads, jnp.int32), BLOCK)
  D, F, R = shape.d_model, shape.d_ff, int(padded.sum())
  key = jax.random.key(0)
  real_R1 = np.zeros((R, 1), bool)
  for first, count in zip(start, loads, strict=True):
    real_R1[first : first + count] = True

  def rows(width):
    return jax.random.normal(key, (R, width), jnp.bfloat16) * real_R1

  def weights(*sizes):
    made = jax.random.normal(key, (shape.num_experts, *sizes), jnp.bfloat16)
    return made * sizes[0] ** -0.5

  x, h, g = rows(D), rows(F), rows(F)[::-1]
  wide, tall = weights(D, F), weights(F, D)
  weight = jax.random.uniform(key, (R,))

  def tile(kernel, way, **sizes):
    return dataclasses.replace(choose(kernel, **sizes), **way)

  def product(left, right, pairs=1, transpose=False):
    width, depth = right.shape[1:] if transpose else right.shape[:0:-1]

    def call(way):
      made = tile("rows", way, width=width, depth=depth, operands=2 * pairs)
      if pairs == 2 and way:  # what memory holds
        made = dataclasses.replace(made, stages=2)
      return lambda groups, x, w: kernels.rows(
        ((x, w),) * pairs, groups, transpose=transpose, tile=made
      )

    return pairs, ROWS, call, (left, right)

  def matrix(left, right):
    def call(way):
      made = tile("matrices", way, width=right.shape[1])
      return lambda groups, x, y: kernels.matrices([x], [y], [groups], tile=made)

    return 1, MATRICES, call, (left, right)

  silu: Any = dict(activation=activations.silu, ups=2, num_sms=None)

  def hidden(way):
    made = tile("hidden", way, width=F, depth=D, operands=3)
    return lambda groups, *arrays: gated.hidden_kernel(
      groups, *arrays, biased=False, hidden=True, product=True, tile=made, **silu
    )

  def back(way):
    made = tile("back", way, width=F, depth=D)
    return lambda groups, *arrays: gated.back_kernel(groups, *arrays, tile=made, **silu)

  def copies(way):
    del way
    return lambda groups, *arrays: [jnp.copy(a) for a in arrays]

  legs = {
    "hidden": (2, HIDDEN, hidden, (x, wide, wide, weight)),
    "down": product(h, tall),
    "back": (1, BACK, back, (x, tall, h, g, weight)),
    "copies": (0, [{}], copies, (h, g)),
    "dx": product(h, wide, pairs=2, transpose=True),
    "dw up": matrix(x, h),
    "dw down": matrix(h, x),
  }
  once = 2.0 * expert_TK.size * D * F
  return {
    name: (n * once, ways, call, (groups, *arrays))
    for name, (n, ways, call, arrays) in legs.items()
  }


def _compiled(legs: dict[str, Leg]) -> list[dict[str, Any]]:
  """A row for every way of every product, compiled side by side."""
  import jax

  rows = [
    {"leg": name, "way": way, "flops": flops, "ms": [], "call": (call(way), operands)}
    for name, (flops, ways, call, operands) in legs.items()
    for way in ways
  ]

  def compile(row):
    function, operands = row["call"]
    try:
      made = jax.jit(function).lower(*operands).compile()
      row["call"] = functools.partial(made, *operands)
    except Exception as e:  # a way that the chip or the compiler refuses is a result
      row["call"], row["refused"] = None, " ".join(str(e).split())[:200]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(compile, rows))
  return rows


def _checked(rows: list[dict[str, Any]]) -> list[str]:
  """Names of rows that differ from the first way of their product."""
  import jax
  import jax.numpy as jnp

  @jax.jit
  def difference(one, other):
    def norm(a):
      return jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32))))

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.stack(
      [
        norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / (norm(b) + 1e-9)
        for a, b in pairs
      ]
    ).max()

  wrong, expected = [], {}
  for row in rows:
    if row["call"] is None:
      continue
    # Said before it runs: a way that hangs is known by name.
    print(f"checking {row['leg']} {_name(row['way'])}", file=sys.stderr, flush=True)
    found = jax.block_until_ready(row["call"]())
    if row["leg"] not in expected:
      expected = {row["leg"]: found}
    row["difference"] = float(difference(found, expected[row["leg"]]))
    if not row["difference"] < 5e-3:
      wrong.append(f"{row['leg']} {row['way']}")
  return wrong


def _timed(rows: list[dict[str, Any]], rounds: int) -> list[float]:
  """Milliseconds into the rows; FLOP/s of square products at every tenth of them."""
  ceilings, order = [], random.Random(0)
  for n in range(rounds + 1):
    # In another order each time: what follows a slow way finds a cooler chip.
    for m, row in enumerate(order.sample(rows, len(rows))):
      if row["call"] is None:
        continue
      if m % 10 == 0:
        ceilings.append(shapes.ceiling(repeats=1))
      (took,) = shapes.seconds(row["call"], repeats=1, inner=10)
      if n:  # the first round warms up
        row["ms"].append(1e3 * took)
  return ceilings


def _name(way: dict[str, Any]) -> str:
  return ", ".join(f"{k}={v}" for k, v in way.items()) or "the table's"


def _show(row: dict[str, Any]) -> None:
  way = _name(row["way"])
  if not row["ms"]:
    print(f"{row['leg']:<8} {way:<50} refused: {row['refused']}", flush=True)
    return
  times = row["ms"]
  print(
    f"{row['leg']:<8} {way:<50}{statistics.median(times):8.3f} ms ({min(times):.3f} "
    f"to {max(times):.3f}){row['tflops']:7.0f} TFLOP/s{row['share']:7.3f} "
    f"difference {row['difference']:.4f}",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
