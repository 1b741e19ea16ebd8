"""Grouped matmul on TPUs by jax's megablox kernels, with both gradients; float32 sums.

The kernels visit the tiles of rows that a group touches, and no others.  Each expert's
rows start at a multiple of a tile here, so that no tile is visited twice: what is
multiplied beside rows that exist is less than one tile of each expert.  Rows past the
last group are neither read nor written: what stands there is whatever was in memory.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import sequential_vmap

from jmoe.kernels.grouped_matmul.reference import expert_of_rows
from jmoe.types import Groups

# Bytes of the 16 MiB that a kernel may use on the smallest chips, by an estimate
# that is 3 MiB short of what the compiler finds for some tiles of 512 rows.
_VMEM = 27 * 2**19
_VMEM_TALL = 13 * 2**20  # of tiles of more rows than
_TALL = 256
_LANES = 128
_MOST_TILES = 4096  # beyond, what finds the tile of an expert without rows is inexact

_interpreted = False


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Within it the kernels run anywhere, slowly: for tests."""
  global _interpreted
  before, _interpreted = _interpreted, True
  try:
    yield
  finally:
    _interpreted = before


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def megablox(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  dtype: Any = None,
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; undefined after the last expert's rows.

  Args:
    x_RD: rows grouped by expert, in bfloat16 or float32; padding rows zero.
    w_EDF: a matrix per expert, in bfloat16 or float32.
    groups: one after the other, aligned to a multiple of 128 rows.
    bias_EF: a bias per expert, or None.
    dtype: of the result; None: the rows'.
  """
  if bias_EF is None:
    return rows(x_RD, w_EDF, groups, dtype=dtype)
  y_RF = rows(x_RD, w_EDF, groups, dtype=jnp.float32)  # rounded once
  expert_R = jnp.maximum(expert_of_rows(groups, x_RD.shape[0]), 0)
  return (y_RF + bias_EF[expert_R].astype(jnp.float32)).astype(dtype or x_RD.dtype)


def _forward(x_RD, w_EDF, groups, bias_EF, dtype):
  y_RF = megablox(x_RD, w_EDF, groups, bias_EF, dtype)
  return y_RF, (x_RD, w_EDF, groups, bias_EF)


def _backward(dtype, residual, dy_RF):
  del dtype
  x_RD, w_EDF, groups, bias_EF = residual
  dy_RF = dy_RF.astype(x_RD.dtype)  # what the matrix units take
  dx_RD = rows(dy_RF, w_EDF, groups, transpose=True)
  dw_EDF = matrices(x_RD, dy_RF, groups).astype(w_EDF.dtype)
  d_bias = None if bias_EF is None else _sums(dy_RF, groups).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


megablox.defvjp(_forward, _backward)


def rows(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  *,
  transpose: bool = False,
  dtype: Any = None,
) -> Array:
  """`x_r w_e(r)`, or with the matrices transposed; `[R,F]`.

  Args:
    x_RD: rows.
    w_EDF: matrices; transposed: [E,F,D], read as they lie in memory.
    groups: aligned.
    transpose: contract the matrices' last dimension instead of the one before it.
    dtype: of the result; None: the rows'.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  (R, D), F = x_RD.shape, w_EDF.shape[1 if transpose else 2]
  widest = np.result_type(x_RD.dtype, w_EDF.dtype)
  kernel = functools.partial(
    gmm,
    preferred_element_type=jnp.dtype(dtype or x_RD.dtype),
    tiling=rows_tile(R, D, F, w_EDF.shape[0], groups.block, widest),
    transpose_rhs=transpose,
    interpret=_interpreted,
  )
  whole_RD = _whole(x_RD, groups.block)
  with jax.numpy_dtype_promotion("standard"):  # what the kernels are written for
    return sequential_vmap(kernel)(whole_RD, w_EDF, _sizes(groups))[:R]


def matrices(x_RD: Array, y_RF: Array, groups: Groups) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any.

  Experts without rows are visited too, to write zeros.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  (R, D), F = x_RD.shape, y_RF.shape[1]
  block = groups.block
  while R > _MOST_TILES * block:
    block *= 2
  kernel = functools.partial(
    tgmm,
    preferred_element_type=x_RD.dtype,
    tiling=matrices_tile(R, D, F, block, x_RD.dtype),
    interpret=_interpreted,
  )
  # The kernel transposes again, and XLA makes nothing of both.
  of_rows = sequential_vmap(lambda x, y, sizes: kernel(x.T, y, sizes))
  with jax.numpy_dtype_promotion("standard"):
    return of_rows(_whole(x_RD, block), _whole(y_RF, block), _sizes(groups))


def _whole(x_RD: Array, block: int) -> Array:
  """With zeros up to whole blocks; the same where there are only such."""
  rest = -x_RD.shape[0] % block
  return jnp.pad(x_RD, ((0, rest), (0, 0))) if rest else x_RD


def _sizes(groups: Groups) -> Array:
  """i32[E] rows of each group with its padding: where the next one starts."""
  return -(-groups.rows // groups.block) * groups.block


def rows_tile(
  num_rows: int, depth: int, cols: int, num_experts: int, block: int, dtype: Any
) -> tuple[int, int, int]:
  """(rows, depth, columns) of a tile of rows times matrices: the fewest bytes read.

  A matrix stays on the chip from one tile of rows to the next if its whole depth fits;
  the rows are read again for every tile of columns.
  """
  size = jnp.dtype(dtype).itemsize
  visits = num_rows // block

  def cost(tile: tuple[int, int]) -> tuple[float, int]:
    tk, tn = tile
    across = -(-cols // tn)
    times = num_experts if tk == depth else visits
    read = across * num_rows * depth + times * across * tn * depth
    return read, -tk * tn

  def fits(tk: int, tn: int) -> bool:
    buffers = 2 * size * (block * tk + tk * tn + block * tn)
    return buffers + 8 * block * tn <= _most(block)

  tk, tn = _best(depth, cols, cost, fits)
  return block, tk, tn


def matrices_tile(
  num_rows: int, depth: int, cols: int, block: int, dtype: Any
) -> tuple[int, int, int]:
  """(rows, depth, columns) of a tile of the matrices' gradients; fewest bytes read."""
  size = jnp.dtype(dtype).itemsize

  def cost(tile: tuple[int, int]) -> tuple[float, int]:
    tk, tn = tile
    return num_rows * (-(-cols // tn) * depth + -(-depth // tk) * cols), -tk * tn

  def fits(tk: int, tn: int) -> bool:
    # Rows are masked in float32 before they are multiplied.
    buffers = (2 * size + 4) * block * (tk + tn)
    return buffers + (2 * size + 4) * tk * tn <= _most(block)

  tk, tn = _best(depth, cols, cost, fits)
  return block, tk, tn


def _most(block: int) -> int:
  return _VMEM if block <= _TALL else _VMEM_TALL


def _best(depth: int, cols: int, cost: Any, fits: Any) -> tuple[int, int]:
  tiles = [(k, n) for k in _widths(depth) for n in _widths(cols) if fits(k, n)]
  return min(tiles, key=cost) if tiles else (_LANES, _LANES)


def _widths(size: int) -> list[int]:
  """Widths of tiles that cover a dimension and nothing beside it, if there are any.

  A dimension that no lanes divide is one tile; where it is too long for that, tiles of
  any number of lanes cover it, and the last one sticks out.
  """
  lanes = range(_LANES, size, _LANES)
  exact = [width for width in lanes if size % width == 0]
  return [*(exact if size % _LANES == 0 else lanes), size]


def _sums(y_RF: Array, groups: Groups) -> Array:
  """f32[E,F] sums of each expert's rows, by blocks; others are not used."""
  (R, F), block = y_RF.shape, groups.block
  expert_R = expert_of_rows(groups, R)
  y_RF = jnp.where((expert_R >= 0)[:, None], y_RF, 0).astype(jnp.float32)
  sum_BF = jnp.sum(y_RF.reshape(-1, block, F), axis=1)
  # The first row of a block that has rows is one of them.
  own_EB = jnp.arange(groups.start.shape[0])[:, None] == expert_R[::block]
  return jnp.matmul(
    own_EB.astype(jnp.float32), sum_BF, precision=jax.lax.Precision.HIGHEST
  )
