"""Other tables of Hopper's tiles, each timed in the whole layer's step.

  python -m experiments.benchmarks.tables --shape qwen3
  python -m experiments.benchmarks.tables --shape qwen3 --beside sonic-moe

A product alone says little of a step: a chip at its power limit runs what follows a
cool operation faster (`benchmarks.tiles` times products alone).  Here each variant of
the table makes a layer of its own, and all take turns in random order.

Exit codes: 0 done, 2 bad arguments, 3 a result was wrong.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks import shapes
from experiments.parser import Parser

_FLIGHT = dict(in_flight=True)
_TALL = dict(cols=256, by_cols=False)
# Name -> kernel -> what is other than in the table; "sums" are products of several.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
  "the table's": {},
  "back together, wide": {
    "back": dict(in_flight=False, alternating=False, cols=256, stages=3)
  },
  "hidden not in flight": {"hidden": dict(in_flight=False)},
  "matrices in flight": {"matrices": _FLIGHT},
  "matrices in bands of 4": {"matrices": dict(band=4)},
  "rows in flight": {"rows": _FLIGHT},
  "rows tall": {"rows": _TALL},
  "rows tall, in flight": {"rows": dict(_FLIGHT, **_TALL)},
  "sums tall": {"sums": _TALL},
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.tables",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", required=True, choices=sorted(shapes.SHAPES), metavar="NAME")
  add("--only", nargs="*", metavar="NAME", help="variants, by their whole names")
  add("--rounds", type=int, default=10)
  add("--beside", nargs="*", default=[], metavar="ROW", help="rows of `peers` beside")
  add("--out", type=Path, help="JSON file for the figures")
  arguments = parser.parse_args(argv)
  names = arguments.only or list(VARIANTS)
  if unknown := sorted(set(names) - set(VARIANTS)):
    parser.error(f"--only: {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from experiments.benchmarks.peers import __main__ as peers, remote, rows

  if unknown := sorted(set(arguments.beside) - set(peers.TORCH)):
    parser.error(f"--beside: {', '.join(unknown)}; known: {', '.join(peers.TORCH)}")
  workers = [
    remote.Worker("experiments.benchmarks.peers." + peers.TORCH[n], n, arguments.shape)
    for n in arguments.beside
  ]
  for worker in workers:
    worker.send(do="build")
  shape = shapes.SHAPES[arguments.shape]
  built = [_row(name, shape) for name in names]
  built += [worker.built(240.0) for worker in workers]
  ready = [row for row in built if isinstance(row, rows.Row)]
  ceilings = rows.in_turn(
    ready, lambda: shapes.ceiling(repeats=1), arguments.rounds, kinds=("step",)
  )
  for worker in workers:
    worker.close()
  bound, found = statistics.median(ceilings), []
  for row in built:
    if row.why:
      print(f"{row.name:<28}missing: {row.why}", flush=True)
      continue
    times, flops = row.ms["step"], shape.flops(backward=True)
    share = flops / statistics.median(times) * 1e3 / bound
    found.append({"name": row.name, "ms": times, "share": share, **row.figures})
    print(
      f"{row.name:<28}{statistics.median(times):9.3f} ms ({min(times):.3f} to "
      f"{max(times):.3f}){share:7.3f}",
      flush=True,
    )
  print(f"ceiling {bound / 1e12:.0f} TFLOP/s")
  if arguments.out:
    import jax

    result = {
      "shape": arguments.shape,
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "ceilings_tflops": [rate / 1e12 for rate in ceilings],
      "rows": found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
  if wrong := rows.wrong([{"drops": False, **row} for row in found]):
    print(f"error: wrong result of {', '.join(wrong)}", file=sys.stderr)
    return 3
  return 0


def _row(name: str, shape: shapes.Shape) -> Any:
  import jax

  from experiments.benchmarks.peers import jax_rows, ours

  jax.clear_caches()  # kernels that were traced with another table
  with _with_table(VARIANTS[name]):
    return jax_rows.row(name, ours.layer, shape)


@contextlib.contextmanager
def _with_table(changes: dict[str, dict[str, Any]]) -> Iterator[None]:
  """The table with other fields for some kernels."""
  from jmoe.kernels import hopper_tiles
  from jmoe.kernels.grouped_ffn import hopper_kernels as of_units
  from jmoe.kernels.grouped_matmul import hopper_kernels as of_products

  chosen = hopper_tiles.choose

  def choose(kernel: str, *, operands: int = 2, **sizes: int) -> Any:
    tile = chosen(kernel, operands=operands, **sizes)
    changed = changes.get("sums" if kernel == "rows" and operands > 2 else kernel, {})
    if tile.cols < 256 and kernel == "rows":
      return tile
    return dataclasses.replace(tile, **changed)

  places: tuple[Any, ...] = (of_units, of_products)
  for place in places:
    place.choose = choose
  try:
    yield
  finally:
    for place in places:
      place.choose = chosen


if __name__ == "__main__":
  sys.exit(main())
