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
from jax import Array

from jmoe.kernels.folding import foldable
from jmoe.kernels.grouped_matmul.hopper_kernels import matrices_kernel, rows_kernel
from jmoe.kernels.hopper import BLOCK, Tile
from jmoe.kernels.pieces import Columns
from jmoe.kernels.row_blocks import sums
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
  dw_EDF = matrices([x_RD], [dy_RF], [groups], num_sms=num_sms)
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
    rows_kernel,
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
  xs: Sequence[Array],
  ys: Sequence[Array],
  groups: Sequence[Groups],
  *,
  num_sms: int | None = None,
  tile: Tile | None = None,
  columns: Columns | None = None,
  into: Array | None = None,
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any.

  Args:
    xs: rows `[R,D]` of one buffer or several, or some columns of them.
    ys: rows `[R,F]` of each.
    groups: of each, aligned to `BLOCK`.
    num_sms: multiprocessors to use; None: all.
    tile: None: that of the table in `hopper_tiles`.
    columns: which ones x has of D; None: all.  Only their rows of a matrix are made.
    into: what other columns gave, and where these are written.
  """
  D, F = xs[0].shape[1], ys[0].shape[1]
  groups, ys = tuple(groups), [padded(y, 1) for y in ys]
  kernel = functools.partial(matrices_kernel, num_sms=num_sms, tile=tile)
  if columns is not None and not columns.whole:
    others = [] if into is None else [into]
    kernel = functools.partial(kernel, columns=columns)
    return foldable(kernel)(groups, *xs, *ys, *others)[:, :, :F]
  return foldable(kernel)(groups, *(padded(x, 1) for x in xs), *ys)[:, :D, :F]


def padded(x: Array, *axes: int) -> Array:
  """With zeros up to sizes that a tile in shared memory can be cut from."""
  sizes = [max(x.shape[n], 128) for n in axes]
  widths = [(0, 0)] * x.ndim
  for n, size in zip(axes, sizes, strict=True):
    widths[n] = (0, -(-size // _ALIGNED) * _ALIGNED - x.shape[n])
  return x if not any(after for _, after in widths) else jnp.pad(x, widths)
