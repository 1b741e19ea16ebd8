"""Which output tile serves which product on Hopper: a small table, nothing is searched.

A new row: measure candidates with `python -m experiments.benchmarks.tiles --shape NAME`
on the chip, write what won into `_TABLE`, and the figures, those that lost too, into
experiments/benchmarks/RESULTS.md.  The first row of a kernel that fits is taken.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

from jmoe.kernels.hopper import BLOCK, Tile


@dataclasses.dataclass(frozen=True)
class Row:
  """For products of at least that size, the tile."""

  width: int  # columns of the result, at least
  depth: int  # contracted, at least
  tile: Tile


_TABLE: dict[str, tuple[Row, ...]] = {
  # rows times matrices, or the sum of several such products
  "rows": (
    Row(256, 0, Tile(BLOCK, 256, by_cols=True)),
    Row(0, 0, Tile(BLOCK, 128, by_cols=True)),
  ),
  # a matrix's gradient; its depth is the rows of an expert, which are not known
  "matrices": (
    Row(256, 0, Tile(128, 256, by_cols=False)),
    Row(0, 0, Tile(128, 128, by_cols=False)),
  ),
  # both hidden arrays of a gated unit, a tile of each
  "hidden": (Row(0, 0, Tile(BLOCK, 128, by_cols=False, in_flight=True)),),
  # their gradients
  "back": (
    Row(0, 0, Tile(BLOCK, 128, by_cols=False, in_flight=True, alternating=True)),
  ),
}


def choose(kernel: str, *, width: int, depth: int = 0, operands: int = 2) -> Tile:
  """The tile of the table, with as many steps ahead as memory holds.

  Args:
    kernel: of the table.
    width: columns of the result.
    depth: contracted; 0 where it is not known.
    operands: tiles that a step copies: rows and matrices, of each product.
  """
  rows = _TABLE[kernel]
  tile = next(row.tile for row in rows if width >= row.width and depth >= row.depth)
  return dataclasses.replace(tile, stages=min(tile.stages, 4 if operands < 4 else 2))
