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
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.types import Groups


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the part of an output tile is that one warpgroup makes."""

  group: Array  # which warpgroup
  row: Array  # of the whole output, the first of its part
  col: Array
  column: Array  # which column of tiles
  rows: int
  cols: int
  own: Any  # its rows or columns of the tile
  real: Array  # False where a tile is only made again, as the end of a chain

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
  multiply: Callable[[Place, Sequence[Any], Sequence[Any]], None],
  finish: Callable[..., None],
  out: tuple[Any, ...],
  name: str,
  begin: Callable[..., Any] = chip.nothing,
  during: Callable[..., None] = chip.nothing,
  scratch: Mapping[str, Any] | None = None,
  num_sms: int | None = None,
  updated: int = 0,
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
    multiply: (place, tiles of lefts and rights in shared memory, accumulators); issues
      the products of one step.
    finish: (place, sums, what `begin` gave, scratch, others, results); stores.
    out: shapes of the results, `updated` ones first.
    name: of the operation.
    begin: (place, others) -> anything, before a tile's first product.
    during: (step, place, scratch, others), before the products of a step.
    scratch: shared memory and barriers by name.
    num_sms: multiprocessors to use; None: all.
    updated: that many of `others`, the first ones, are written over by results.
  """
  (R, D), dtype = lefts[0].shape, lefts[0].dtype
  F = rights[0].shape[1 if transpose else 2]
  steps, columns = pl.cdiv(D, DEPTH), pl.cdiv(F, tile.cols)
  tile = tile.that_fits(columns)
  bands = columns // tile.cluster
  sms = num_sms or chip.multiprocessors()
  blocks, used = max(1, sms // tile.cluster), chip.used_blocks(groups, R)
  # Thread blocks of a cluster make columns side by side of the same rows.
  left_spec = plgpu.BlockSpec(
    (tile.rows, DEPTH),
    lambda k: (0, k),
    transforms=chip.swizzled(dtype, DEPTH),
    **tile.shared,
  )
  shape = (tile.cols, DEPTH) if transpose else (DEPTH, tile.cols)
  right_spec = plgpu.BlockSpec(
    shape,
    (lambda k: (0, k)) if transpose else (lambda k: (k, 0)),
    transforms=chip.swizzled(dtype, DEPTH if transpose else 64),
  )
  specs = [left_spec] * len(lefts) + [right_spec] * len(rights)

  def body(*refs):
    parts = []
    for count in (len(others), len(lefts), len(rights), 3):
      parts.append(refs[:count])
      refs = refs[count:]
    other_refs, left_refs, right_refs, (expert_ref, block_ref, used_ref) = parts
    out_refs = refs

    def pipe(step, context, state=None):
      return chip.pipeline(
        step, context, steps=steps, specs=specs, stages=tile.stages, state=state
      )

    whole = [jax.ShapeDtypeStruct((tile.rows, D), dtype)] * len(lefts)
    whole += [
      jax.ShapeDtypeStruct((tile.cols, D) if transpose else (D, tile.cols), dtype)
    ] * len(rights)

    @chip.scoped(
      buffers=pipe(chip.nothing, chip.nothing).get_allocations(*whole),
      scratch=dict(scratch or {}),
    )
    def _(buffers, scratch):
      group = lax.axis_index("wg")

      def make(t, state, real):
        which, band = chip.in_bands(t, used_ref[0], bands, tile.band)
        column = band * tile.cluster + tile.member()
        place = _place(tile, group, block_ref[which] * BLOCK, column, real)

        def step(indices, *operands):
          during(indices[0], place, scratch, other_refs)
          multiply(place, operands[:-1], operands[-1])
          plgpu.wgmma_wait(0)
          return operands[-1]

        def context(run):
          def with_sums(*totals):
            begun = begin(place, other_refs)
            run(totals)
            values = [total[...] for total in totals]
            finish(place, values, begun, scratch, other_refs, out_refs)

          pl.run_scoped(with_sums, *[chip.accumulator(*tile.own)] * sums)

        e, across = expert_ref[which], pl.ds(column * tile.cols, tile.cols)
        rows = pl.ds(block_ref[which] * BLOCK, tile.rows)
        pipe(step, context, state)(
          *[ref.at[rows, :] for ref in left_refs],
          *[
            ref.at[(e, across) if transpose else (e, slice(None), across)]
            for ref in right_refs
          ],
          allocations=buffers,
        )

      count = used_ref[0] * bands
      chip.each_tile(count, blocks=blocks, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  kernel = chip.launch(
    body, out, blocks=blocks, cluster=tile.cluster, name=name, updated=updated
  )
  operands = (*others, *lefts, *rights)
  return kernel(*operands, used.expert, used.block, used.used)


def _place(tile: Tile, group: Array, row: Array, column: Array, real: Array) -> Place:
  rows, cols = tile.own
  col = column * tile.cols
  if tile.by_cols:
    own = pl.ds(group * cols, cols)
    return Place(group, row, col + group * cols, column, rows, cols, own, real)
  own = pl.ds(group * rows, rows)
  return Place(group, row + group * rows, col, column, rows, cols, own, real)


def store(value: Array, staged: Any, place: Place, ref: Any) -> None:
  """A warpgroup's part of a tile to its place in a result, through shared memory."""
  chip.store(
    value.astype(staged.dtype), staged, place.group, functools.partial(place.of, ref)
  )


def values_of_rows(place: Place, ref: Any) -> Array:
  """[rows] a number for each row of a warpgroup's part, from global memory."""
  rows = pl.ds(place.row, place.rows)
  if jax.__version_info__ < (0, 11):
    return plgpu.load(ref, (rows,), optimized=False)
  load: Any = plgpu.load  # takes no index any more
  return load(ref.at[rows], optimized=False)


def scaled(tile: Array, scale: Array) -> Array:
  """Rows of a tile times a number each."""
  return tile * lax.broadcast_in_dim(scale, tile.shape, (0,))
