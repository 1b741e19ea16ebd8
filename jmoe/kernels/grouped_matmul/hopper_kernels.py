"""The two kernels of the grouped matmul on Hopper GPUs: of rows, and of matrices.

See `hopper.py` for what they compute, and for prefixes of names.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.kernels.hopper_rows import (
  multiply,
  over_columns,
  over_rows,
  row_kernel,
  store,
  values_of_columns,
  values_of_rows,
  whole_tiles,
)
from jmoe.kernels.hopper_tiles import choose
from jmoe.kernels.hopper_walk import Operand, Work, walk
from jmoe.kernels.pieces import Columns
from jmoe.kernels.row_blocks import in_bands
from jmoe.types import Groups


def rows_kernel(
  groups: Groups,
  *operands: Array,
  pairs: int,
  transpose: bool,
  num_sms: int | None,
  out: Any,
  tile: Tile | None,
  columns: Columns | None,
) -> Array:
  """`[R,F]`; operands are rows and matrices of each pair, then biases, then weights."""
  operands, others = operands[: 2 * pairs], operands[2 * pairs :]
  lefts, rights = operands[::2], operands[1::2]
  (R, D), F = lefts[0].shape, rights[0].shape[1 if transpose else 2]
  columns = columns if columns and not columns.whole else Columns(0, F, F)
  F = columns.size
  tile = tile or choose("rows", width=F, depth=D, operands=len(operands))

  others = tuple(whole_tiles(a, tile) if n == 0 else a for n, a in enumerate(others))

  def products(place, tiles, totals):
    for x, w in zip(tiles[:pairs], tiles[pairs:], strict=True):
      multiply(tile, place, totals[0], x, w, transpose=transpose)

  def begin(place, others):
    both = values_of_columns, values_of_rows
    return [read(place, ref) for read, ref in zip(both, others)]

  def finish(place, totals, begun, scratch, others, results):
    del others
    (y,) = totals
    if begun:
      bias = over_columns(begun[0], y)
      y += bias if len(begun) == 1 else bias * over_rows(begun[1], y)
    store(y, scratch["staged"], place, results[0])

  (made,) = row_kernel(
    groups,
    others,
    lefts,
    rights,
    tile=tile,
    transpose=transpose,
    sums=1,
    products=products,
    begin=begin,
    finish=finish,
    scratch={"staged": chip.staging(tile.own[0], out)},
    out=(chip.struct((R, F), out, operands),),
    name="grouped_matmul_transposed" if transpose else "grouped_matmul",
    num_sms=num_sms,
    columns=columns,
  )
  return made


def matrices_kernel(
  groups: tuple[Groups, ...],
  *arrays: Array,
  num_sms: int | None,
  tile: Tile | None,
  columns: Columns | None = None,
) -> Array:
  """`[E,D,F]`, from the rows x of each buffer, then the rows y of each.

  One array more holds the rows of matrices that are of other columns of x.
  """
  parts = len(groups)
  xs, ys, into = arrays[:parts], arrays[parts : 2 * parts], arrays[2 * parts :]
  D, dtype = xs[0].shape[1], xs[0].dtype
  columns = columns or Columns(0, D, D)
  F, E = ys[0].shape[1], groups[0].start.shape[0]
  tile = tile or choose("matrices", width=F)
  rows, cols = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.cols)
  # Thread blocks of a cluster make rows one below the other of the same columns.
  tile = tile.that_fits(rows)
  tall = rows // tile.cluster
  rows_own, cols_own = tile.own
  blocks = max(1, (num_sms or chip.multiprocessors()) // tile.cluster)
  # An expert without rows in a buffer points inside it, and is not read there.
  starts = [
    jnp.minimum(one.start, x.shape[0] - BLOCK)
    for one, x in zip(groups, xs, strict=True)
  ]
  waves = chip.waves(xs, ys)

  def body(*refs):
    *given, w_ref = refs[len(into) :]
    x_refs, y_refs, start_refs, rows_refs = (
      given[n * parts : (n + 1) * parts] for n in range(4)
    )

    def arguments(t):
      """(expert, row and column of tiles)."""
      e = lax.div(t, jnp.int32(tall * cols))
      within = t - e * (tall * cols)
      row, col = in_bands(within, jnp.int32(tall), cols, min(tile.band, tall))
      return e, row * tile.cluster + tile.member(), col

    def steps(which):
      counts = [ref[which[0]] + (BLOCK - 1) for ref in rows_refs]
      return [lax.div(rows, jnp.int32(BLOCK)) * (BLOCK // DEPTH) for rows in counts]

    def own(group):
      return pl.ds(0 if tile.alternating else group * rows_own, rows_own)

    def make(group, which, scratch, over):
      e, row, col = which

      def with_sum(total):
        over((total,))
        top = columns.first + row * tile.rows + own(group).start

        def place(r, rows, c, cols):
          left = col * tile.cols + c
          return w_ref.at[e, pl.ds(top + r, rows), pl.ds(left, cols)]

        chip.store(total[...].astype(dtype), scratch["staged"], group, place)

      pl.run_scoped(with_sum, chip.accumulator(rows_own, cols_own))

    def step(k, group, which, scratch, tiles, totals):
      del k, which, scratch
      x, y = tiles
      plgpu.wgmma(totals[0], chip.transposed(x.at[:, own(group)]), y)

    def operand(refs, dimension, width, *, shared=False):
      def source(ref):
        return lambda which: ref.at[:, pl.ds(which[dimension] * width, width)]

      def origin(start_ref):
        return lambda which: lax.div(start_ref[which[0]], jnp.int32(DEPTH))

      first, *others = zip(map(source, refs), map(origin, start_refs), strict=True)
      return Operand(width, 0, dtype, *first, shared=shared, others=tuple(others))

    walk(
      [
        operand(x_refs, 1, tile.rows),
        operand(y_refs, 2, tile.cols, shared=tile.cluster > 1),
      ],
      Work(arguments, steps, make, step),
      tile=tile,
      count=jnp.int32(E * tall * cols),
      blocks=blocks,
      waves=waves,
      scratch={"staged": chip.staging(rows_own, dtype)},
    )

  kernel = chip.launch(
    body,
    (chip.struct((E, columns.total, F), dtype, xs),),
    blocks=blocks * waves,
    cluster=tile.cluster,
    name="grouped_matmul_matrices",
    updated=len(into),
  )
  (made,) = kernel(*into, *xs, *ys, *starts, *(one.rows for one in groups))
  return made
