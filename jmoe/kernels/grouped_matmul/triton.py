"""Grouped matmul in Pallas's Triton: NVIDIA GPUs of compute capability 8.0 and up.

Bfloat16, float16 and float32, with float32 sums.  One program makes one output tile,
whose rows are of one expert.  The grid is static: programs past the tiles that hold
rows return at once, so that blocks without rows are neither read nor written, and what
stands there after a call is whatever was in memory.  Padding rows may hold anything:
the gradients of matrices and biases read only rows that exist.

Prefixes of names: `x` rows that go in, `y` rows that come out.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any

import jax
from jax import Array

from jmoe.kernels.folding import foldable
from jmoe.kernels.grouped_matmul.triton_kernels import matrices_kernel, rows_kernel
from jmoe.kernels.grouped_matmul.triton_tiles import row_tile
from jmoe.kernels.row_blocks import sums
from jmoe.types import Groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def triton(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; undefined in blocks without rows.

  Args:
    x_RD: rows grouped by expert.
    w_EDF: a matrix per expert.
    groups: aligned to a multiple of 16 rows.
    bias_EF: a bias per expert, or None.
    dtype: of the result; None: x's.
    interpret: run in plain jax, anywhere.
  """
  out = dtype or x_RD.dtype
  return rows(x_RD, w_EDF, groups, bias_EF, dtype=out, interpret=interpret)


def _forward(x_RD, w_EDF, groups, bias_EF, dtype, interpret):
  y_RF = triton(x_RD, w_EDF, groups, bias_EF, dtype, interpret)
  return y_RF, (x_RD, w_EDF, groups, bias_EF)


def _backward(dtype, interpret, residual, dy_RF):
  del dtype
  x_RD, w_EDF, groups, bias_EF = residual
  dy_RF = dy_RF.astype(x_RD.dtype)
  dx_RD = rows(
    dy_RF, w_EDF, groups, transpose=True, dtype=x_RD.dtype, interpret=interpret
  )
  dw_EDF = matrices(x_RD, dy_RF, groups, dtype=w_EDF.dtype, interpret=interpret)
  d_bias = None
  if bias_EF is not None:
    d_bias = sums(dy_RF, groups, row_tile(groups.block)).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


triton.defvjp(_forward, _backward)


def rows(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  *,
  transpose: bool = False,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`x_r w_e(r) + bias_e(r)`, or with the matrices transposed; `[R,F]`.

  Args:
    x_RD: rows.
    w_EDF: matrices [E,D,F] (transposed: [E,F,D]).
    groups: aligned to a multiple of 16 rows.
    bias_EF: biases, or None.
    transpose: contract the matrices' last dimension instead of the one before it.
    dtype: of the result; None: x's.
    interpret: run in plain jax.
  """
  kernel = functools.partial(
    rows_kernel, transpose=transpose, out=dtype or x_RD.dtype, interpret=interpret
  )
  biases = () if bias_EF is None else (bias_EF,)
  return foldable(kernel)(groups, x_RD, w_EDF, *biases)


def matrices(
  x_RD: Array,
  y_RF: Array,
  groups: Groups,
  *,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any."""
  out = dtype or x_RD.dtype
  kernel = functools.partial(matrices_kernel, out=out, interpret=interpret)
  return foldable(kernel)(groups, x_RD, y_RF)
