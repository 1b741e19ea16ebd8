"""Kernels on Hopper whose output tiles are rows of one expert times its matrix.

A row tile is a block of the layout, so that it reads the matrix of one expert.  What
such kernels differ in is how many products they sum, and what they make of the sums.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import BLOCK, Tile
from jmoe.kernels.hopper_walk import Operand, Work, walk
from jmoe.kernels.pieces import Columns, Part
from jmoe.kernels.row_blocks import in_bands, used_blocks
from jmoe.types import Groups


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the part of an output tile is that one warpgroup makes."""

  group: Array  # which warpgroup
  expert: Array
  row: Array  # of the whole output, the first of its part
  col: Array
  column: Array  # which column of tiles
  rows: int
  cols: int
  own: Any  # its rows of the tile, or its columns (`Tile.by_cols`)

  def of(self, ref: Any, r: int = 0, rows: int = 0, c: int = 0, cols: int = 0) -> Any:
    """Its part of an array `[R,F]`, or a piece of that part."""
    down = pl.ds(self.row + r, rows or self.rows)
    return ref.at[down, pl.ds(self.col + c, cols or self.cols)]


def row_kernel(
  groups: Groups,
  others: Sequence[Array],
  lefts: Sequence[Array],
  rights: Sequence[Array],
  *,
  tile: Tile,
  transpose: bool,
  sums: int,
  products: Callable[[Place, Sequence[Any], Sequence[Any]], None],
  finish: Callable[..., None],
  out: tuple[Any, ...],
  name: str,
  begin: Callable[..., Any] = chip.nothing,
  during: Callable[..., None] = chip.nothing,
  scratch: Mapping[str, Any] | None = None,
  num_sms: int | None = None,
  updated: int = 0,
  columns: Columns | None = None,
  part: Part | None = None,
) -> tuple[Array, ...]:
  """A kernel that makes `sums` arrays `[R,F]` of products, and `finish`es them.

  Args:
    groups: aligned to `BLOCK`.
    others: arrays that `begin`, `during` and `finish` get as refs.
    lefts: rows [R,D], all of one shape and dtype.
    rights: matrices [E,D,F], or with `transpose` [E,F,D].
    tile: of the output, and how it is made.
    transpose: the matrices' last dimension is contracted, not the one before it.
    sums: accumulators of a tile.
    products: (place, tiles of lefts and rights in shared memory, accumulators); issues
      those of one step.
    finish: (place, sums, what `begin` gave, scratch, others, results); stores.
    out: shapes of the results, `updated` ones first.
    name: of the operation.
    begin: (place, others) -> anything, before a tile's first product.
    during: (step, place, scratch, others), before the products of a step.
    scratch: shared memory and barriers by name.
    num_sms: multiprocessors to use; None: all.
    updated: that many of `others`, the first ones, are written over by results.
    columns: of the matrices; None: all.  Places count from the first of them.
    part: of the buffer, which `groups` and `lefts` are of; None: all.  Places are
      those of the buffer.
  """
  (R, D), dtype = lefts[0].shape, lefts[0].dtype
  F = rights[0].shape[1 if transpose else 2]
  columns = columns or Columns(0, F, F)
  wide = pl.cdiv(columns.size, tile.cols)
  tile = tile.that_fits(wide)
  bands = wide // tile.cluster
  sms = num_sms or chip.multiprocessors()
  blocks, used = max(1, sms // tile.cluster), used_blocks(groups, R, BLOCK)
  waves, steps = chip.waves(lefts, rights), pl.cdiv(D, chip.depth(dtype))

  def body(*refs):
    parts = []
    for count in (len(others), len(lefts), len(rights), 3):
      parts.append(refs[:count])
      refs = refs[count:]
    other_refs, left_refs, right_refs, (expert_ref, block_ref, used_ref) = parts
    out_refs = refs

    def arguments(t):
      """(expert, first row, column of tiles)."""
      which, band = in_bands(t, used_ref[0], bands, tile.band)
      # Thread blocks of a cluster make columns side by side of the same rows.
      column = band * tile.cluster + tile.member()
      return expert_ref[which], block_ref[which] * BLOCK, column

    def make(group, which, scratch, over):
      place = _place(tile, group, which, part)

      def with_sums(*totals):
        begun = begin(place, other_refs)
        over(totals)
        values = [total[...] for total in totals]
        finish(place, values, begun, scratch, other_refs, out_refs)

      pl.run_scoped(with_sums, *[chip.accumulator(*tile.own)] * sums)

    def step(k, group, which, scratch, tiles, totals):
      place = _place(tile, group, which, part)
      during(k, place, scratch, other_refs)
      products(place, tiles, totals)

    def left(ref):
      def source(which):
        return ref.at[pl.ds(which[1], tile.rows), :]

      return Operand(tile.rows, 1, dtype, source, shared=tile.cluster > 1)

    def right(ref):
      def source(which):
        first = columns.first + which[2] * tile.cols
        e, across = which[0], pl.ds(first, tile.cols)
        return ref.at[e, across, :] if transpose else ref.at[e, :, across]

      return Operand(tile.cols, int(transpose), dtype, source)

    walk(
      [*map(left, left_refs), *map(right, right_refs)],
      Work(arguments, lambda _: (steps,), make, step, len(rights)),
      tile=tile,
      count=used_ref[0] * bands,
      blocks=blocks,
      waves=waves,
      scratch=scratch or {},
    )

  kernel = chip.launch(
    body, out, blocks=blocks * waves, cluster=tile.cluster, name=name, updated=updated
  )
  operands = (*others, *lefts, *rights)
  return kernel(*operands, used.expert, used.block, used.used)


def _place(tile: Tile, group: Array, which: Any, part: Part | None) -> Place:
  (rows, cols), (expert, row, column) = tile.own, which
  row = part.in_whole(row) if part else row
  col, own = column * tile.cols, pl.ds(0, rows)
  if tile.by_cols and not tile.alternating:
    own, col = pl.ds(group * cols, cols), col + group * cols
  elif not tile.alternating:
    own, row = pl.ds(group * rows, rows), row + group * rows
  return Place(group, expert, row, col, column, rows, cols, own)


def multiply(
  tile: Tile, place: Place, total: Any, x: Any, w: Any, *, transpose: bool = False
) -> None:
  """Adds the product of a step's two tiles to a warpgroup's sums."""
  if tile.alternating or not tile.by_cols:
    x = x.at[place.own]
    w = chip.transposed(w) if transpose else w
  elif transpose:
    w = chip.transposed(w.at[place.own])
  else:
    w = w.at[:, place.own]
  plgpu.wgmma(total, x, w)


def store(value: Array, staged: Any, place: Place, ref: Any) -> None:
  """A warpgroup's part of a tile to its place in a result, through shared memory."""
  chip.store(
    value.astype(staged.dtype), staged, place.group, functools.partial(place.of, ref)
  )


def values_of_rows(place: Place, ref: Any) -> Array:
  """[rows] of an array [R], for the rows of a warpgroup's part of a tile."""
  return _from_global(ref, pl.ds(place.row, place.rows))


def values_of_columns(place: Place, ref: Any) -> Array:
  """[cols] of an array [E,F], for the expert and the columns of a part of a tile.

  Nothing stops at the end of the array: it must be of `whole_tiles`.
  """
  return _from_global(ref, place.expert, pl.ds(place.col, place.cols))


def _from_global(ref: Any, *index: Any) -> Array:
  """A vector in registers; of few values, so that how it is read does not matter."""
  if jax.__version_info__ < (0, 11):
    return plgpu.load(ref, index, optimized=False)
  load: Any = plgpu.load  # takes no index any more
  return load(ref.at[index], optimized=False)


def whole_tiles(values_EF: Array, tile: Tile) -> Array:
  """With zeros up to whole tiles, as `values_of_columns` reads them."""
  beyond = -values_EF.shape[1] % tile.cols
  return jnp.pad(values_EF, ((0, 0), (0, beyond)))


def over_rows(values: Array, tile: Array) -> Array:
  """A number for each row, as wide as a tile."""
  return lax.broadcast_in_dim(values.astype(jnp.float32), tile.shape, (0,))


def over_columns(values: Array, tile: Array) -> Array:
  """A number for each column, as high as a tile."""
  return lax.broadcast_in_dim(values.astype(jnp.float32), tile.shape, (1,))
