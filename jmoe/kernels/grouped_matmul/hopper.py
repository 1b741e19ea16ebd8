"""Grouped matmul on Hopper GPUs, with its two gradients; 16-bit types, float32 sums.

The layout is aligned to `hopper.BLOCK` rows.  Blocks without rows are neither read nor
written: what stands there after a call is whatever was in memory.  At their places the
gradients of the matrices read only rows that exist, and padding rows must be zero.

Prefixes of names: `x` rows that go in, `y` rows that come out.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.folding import foldable
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
from jmoe.kernels.row_blocks import in_bands, sums
from jmoe.types import Groups

_ALIGNED = 64  # tiles in shared memory are 128 bytes wide, and so is what they are of


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def hopper(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  num_sms: int | None = None,
  dtype: Any = None,
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; undefined in blocks without rows.

  Args:
    x_RD: rows grouped by expert, in bfloat16 or float16; padding rows zero.
    w_EDF: a matrix per expert, of the same dtype.
    groups: aligned to `BLOCK`.
    bias_EF: a bias per expert, or None.
    num_sms: multiprocessors to use; None: all.
    dtype: of the result, the operands' or float32; None: the operands'.
  """
  return rows(((x_RD, w_EDF),), groups, bias_EF, num_sms=num_sms, dtype=dtype)


def _forward(x_RD, w_EDF, groups, bias_EF, num_sms, dtype):
  y_RF = hopper(x_RD, w_EDF, groups, bias_EF, num_sms, dtype)
  return y_RF, (x_RD, w_EDF, groups, bias_EF)


def _backward(num_sms, dtype, residual, dy_RF):
  del dtype
  x_RD, w_EDF, groups, bias_EF = residual
  dy_RF = dy_RF.astype(x_RD.dtype)  # what the tensor cores take
  dx_RD = rows(((dy_RF, w_EDF),), groups, transpose=True, num_sms=num_sms)
  dw_EDF = matrices(x_RD, dy_RF, groups, num_sms=num_sms)
  d_bias = None
  if bias_EF is not None:
    d_bias = sums(dy_RF, groups, BLOCK).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


hopper.defvjp(_forward, _backward)


def rows(
  pairs: Sequence[tuple[Array, Array]],
  groups: Groups,
  bias_EF: Array | None = None,
  weight_R: Array | None = None,
  *,
  transpose: bool = False,
  num_sms: int | None = None,
  dtype: Any = None,
  tile: Tile | None = None,
  columns: Columns | None = None,
) -> Array:
  """`weight_r bias_e(r) + sum over pairs of x_r w_e(r)`; `[R,F]`.

  Args:
    pairs: rows [R,D] and matrices [E,D,F] (transposed: [E,F,D]), all of one shape.
    groups: aligned to `BLOCK`.
    bias_EF: a bias per expert, or None.
    weight_R: f32[R] of the bias alone, or None for ones.
    transpose: contract the matrices' last dimension instead of the one before it.
    num_sms: multiprocessors to use; None: all.
    dtype: of the result; None: the operands'.
    tile: None: that of the table in `hopper_tiles`.
    columns: of the result, which alone are made; None: all.
  """
  cols = pairs[0][1].shape[1 if transpose else 2]
  if columns is not None:
    cols = columns.size
    if bias_EF is not None:
      bias_EF = bias_EF[:, columns.first : columns.first + cols]
  kernel = functools.partial(
    _rows_kernel,
    pairs=len(pairs),
    transpose=transpose,
    num_sms=num_sms,
    out=dtype or pairs[0][0].dtype,
    tile=tile,
    columns=columns,
  )
  operands = [x for pair in pairs for x in (padded(pair[0], 1), padded(pair[1], 1, 2))]
  if bias_EF is not None:
    operands.append(padded(bias_EF, 1))
    operands += [] if weight_R is None else [weight_R]
  return foldable(kernel)(groups, *operands)[:, :cols]


def matrices(
  x_RD: Array,
  y_RF: Array,
  groups: Groups,
  *,
  num_sms: int | None = None,
  tile: Tile | None = None,
  columns: Columns | None = None,
  into: Array | None = None,
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any.

  Args:
    x_RD: rows, or some columns of them.
    y_RF: rows.
    groups: aligned to `BLOCK`.
    num_sms: multiprocessors to use; None: all.
    tile: None: that of the table in `hopper_tiles`.
    columns: which ones x has of D; None: all.  Only their rows of a matrix are made.
    into: what other columns gave, and where these are written; not inside `shard_map`.
  """
  D, F = x_RD.shape[1], y_RF.shape[1]
  kernel = functools.partial(_matrices_kernel, num_sms=num_sms, tile=tile)
  if columns is not None and not columns.whole:
    others = [] if into is None else [into]
    kernel = functools.partial(kernel, columns=columns)
    return foldable(kernel)(groups, x_RD, padded(y_RF, 1), *others)[:, :, :F]
  return foldable(kernel)(groups, padded(x_RD, 1), padded(y_RF, 1))[:, :D, :F]


def padded(x: Array, *axes: int) -> Array:
  """With zeros up to sizes that a tile in shared memory can be cut from."""
  sizes = [max(x.shape[n], 128) for n in axes]
  widths = [(0, 0)] * x.ndim
  for n, size in zip(axes, sizes, strict=True):
    widths[n] = (0, -(-size // _ALIGNED) * _ALIGNED - x.shape[n])
  return x if not any(after for _, after in widths) else jnp.pad(x, widths)


def _rows_kernel(
  groups: Groups,
  *operands: Array,
  pairs: int,
  transpose: bool,
  num_sms: int | None,
  out: Any,
  tile: Tile | None,
  columns: Columns | None,
) -> Array:
  """Operands are rows and matrices of each pair in turn, then biases, then weights."""
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


def _matrices_kernel(
  groups: Groups,
  x_RD: Array,
  y_RF: Array,
  *into: Array,
  num_sms: int | None,
  tile: Tile | None,
  columns: Columns | None = None,
) -> Array:
  R, D = x_RD.shape
  columns = columns or Columns(0, D, D)
  F, E = y_RF.shape[1], groups.start.shape[0]
  tile, dtype = tile or choose("matrices", width=F), x_RD.dtype
  rows, cols = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.cols)
  # Thread blocks of a cluster make rows one below the other of the same columns.
  tile = tile.that_fits(rows)
  tall = rows // tile.cluster
  rows_own, cols_own = tile.own
  blocks = max(1, (num_sms or chip.multiprocessors()) // tile.cluster)
  # An expert without rows points inside the buffer, and its sum is not used.
  start_E = jnp.minimum(groups.start, R - BLOCK)

  def body(*refs):
    x_ref, y_ref, start_ref, rows_ref, w_ref = refs[len(into) :]

    def arguments(t):
      """(expert, row and column of tiles)."""
      e = lax.div(t, jnp.int32(tall * cols))
      within = t - e * (tall * cols)
      row, col = in_bands(within, jnp.int32(tall), cols, min(tile.band, tall))
      return e, row * tile.cluster + tile.member(), col

    def steps(which):
      blocks = lax.div(rows_ref[which[0]] + (BLOCK - 1), jnp.int32(BLOCK))
      return blocks * (BLOCK // DEPTH)

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

    def origin(which):
      return lax.div(start_ref[which[0]], jnp.int32(DEPTH))

    def left(which):
      return x_ref.at[:, pl.ds(which[1] * tile.rows, tile.rows)]

    def right(which):
      return y_ref.at[:, pl.ds(which[2] * tile.cols, tile.cols)]

    walk(
      [
        Operand(tile.rows, 0, dtype, left, origin),
        Operand(tile.cols, 0, dtype, right, origin, shared=tile.cluster > 1),
      ],
      Work(arguments, steps, make, step),
      tile=tile,
      count=jnp.int32(E * tall * cols),
      blocks=blocks,
      scratch={"staged": chip.staging(rows_own, dtype)},
    )

  kernel = chip.launch(
    body,
    (chip.struct((E, columns.total, F), dtype, x_RD),),
    blocks=blocks,
    cluster=tile.cluster,
    name="grouped_matmul_matrices",
    updated=len(into),
  )
  (made,) = kernel(*into, x_RD, y_RF, start_E, groups.rows)
  return made
