"""`jax.lax.ragged_dot` by jmoe's grouped matmuls: a swap of one name.

jax's own is a masked dense product on CPUs and GPUs, as many times the work as there
are groups.  This one brings the rows to where each group starts at a multiple of a
block, multiplies only those that exist, and brings the products back.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels import permute_rows
from jmoe.kernels.devices import (
  current_device,
  row_alignment,
  spare_blocks,
)
from jmoe.kernels.grouped_matmul import grouped_matmul
from jmoe.kernels.grouped_matmul.api import choose
from jmoe.kernels.varying import axes_of, search, together
from jmoe.types import Groups, wide
from jmoe.use import shown


def ragged_dot(
  lhs: Array,
  rhs: Array,
  group_sizes: Array,
  precision: Any = None,
  preferred_element_type: Any = None,
  group_offset: Array | None = None,
) -> Array:
  """Rows of group g times matrix g; the first rows are of group 0, and so on.

  >>> import jax, jmoe
  >>> x, w = jax.numpy.ones((5, 2)), jax.numpy.ones((3, 2, 4))
  >>> jmoe.ragged_dot(x, w, jax.numpy.array([2, 0, 2])).sum(axis=1)
  Array([8., 8., 8., 8., 0.], dtype=float32)

  Args:
    lhs: `[m, k]`.
    rhs: `[g, k, n]`; where one dtype is wider than the other, that one's is used.
    group_sizes: integers `[g]`, not negative; their sum is at most m.
    precision: None or the default one: sums are in float32 or wider in any case.
    preferred_element_type: of the result; None: that of the operands.  Float32 of
      16-bit operands is not rounded on the way; what is narrower is rounded once.
    group_offset: None; jax's own does not take one on most devices either.

  Returns:
    `[m, n]`; rows past the last group are zero.  Differentiable in `lhs` and `rhs`,
    with cotangents in the operands' dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit, or what is not supported.
  """
  lhs, rhs, group_sizes = (jnp.asarray(x) for x in (lhs, rhs, group_sizes))
  common, dtype = _checked(
    lhs, rhs, group_sizes, precision, preferred_element_type, group_offset
  )
  lhs, rhs = lhs.astype(common), rhs.astype(common)
  (M, _), G = lhs.shape, rhs.shape[0]
  if M == 0 or G == 0:
    return jnp.zeros((M, rhs.shape[2]), dtype)
  lhs, rhs, sizes_G = together(lhs, rhs, group_sizes.astype(jnp.int32))
  block = max(row_alignment(lhs.dtype, M / G), 8 if M < 64 * G else 64)
  if _chosen(lhs, rhs, block) == "ragged_dot":  # XLA's own, which wants no blocks
    return jax.lax.ragged_dot(lhs, rhs, sizes_G, preferred_element_type=dtype)
  blocks = (M + (block - 1) * min(G, M)) // block
  R = (blocks + spare_blocks(blocks)) * block
  end_G = jnp.cumsum(sizes_G, dtype=jnp.int32)
  padded_G = -(-sizes_G // block) * block
  start_G = jnp.cumsum(padded_G, dtype=jnp.int32) - padded_G
  moved_G = start_G - (end_G - sizes_G)  # how far each group moves
  row_M, row_R = jnp.arange(M, dtype=jnp.int32), jnp.arange(R, dtype=jnp.int32)
  group_M = search(end_G, row_M, "right")
  there_M = jnp.where(
    row_M < end_G[-1], row_M + moved_G[jnp.minimum(group_M, G - 1)], R
  )
  group_R = search(start_G + padded_G, row_R, "right")
  group_R = jnp.minimum(group_R.astype(jnp.int32), G - 1)
  place_R = row_R - start_G[group_R]
  taken_R = (place_R >= 0) & (place_R < sizes_G[group_R])
  back_R = jnp.where(taken_R, row_R - moved_G[group_R], M)
  groups = Groups(start_G, sizes_G, block)
  x_RK = reordered(lhs, back_R, there_M)
  y_RN = _product(x_RK, rhs, groups, dtype)
  return reordered(y_RN, there_M, back_R)


@jax.custom_vjp
def reordered(rows: Array, index: Array, inverse: Array) -> Array:
  """`rows[index]`, zero where the index is past the end.

  Args:
    rows: `[N, D]`.
    index: i32[R].
    inverse: i32[N] where each row goes; R for nowhere.  The gradient reads it, and so
      is a gather too.
  """
  del inverse
  return permute_rows.take(rows, index)


def _reordered_forward(rows, index, inverse):
  return reordered(rows, index, inverse), inverse


def _reordered_backward(inverse, grad):
  return permute_rows.take(grad, inverse), None, None


reordered.defvjp(_reordered_forward, _reordered_backward)


def _product(x_RK: Array, w_GKN: Array, groups: Groups, dtype: Any) -> Array:
  """The products in the dtype asked for, which may be wider than the operands'."""
  if jnp.dtype(dtype).itemsize <= x_RK.dtype.itemsize:
    return grouped_matmul(x_RK, w_GKN, groups).astype(dtype)
  name = _chosen(x_RK, w_GKN, groups.block)
  if name == "hopper" and dtype == jnp.float32:
    from jmoe.kernels.grouped_matmul.hopper import hopper  # imports Pallas

    return hopper(x_RK, w_GKN, groups, None, None, jnp.float32)
  if name == "triton" and dtype == jnp.float32:
    from jmoe.kernels.grouped_matmul.triton import triton  # imports Pallas

    return triton(x_RK, w_GKN, groups, None, jnp.float32)
  if name == "megablox" and dtype == jnp.float32:
    from jmoe.kernels.grouped_matmul.megablox import megablox

    return megablox(x_RK, w_GKN, groups, None, jnp.float32)
  made = grouped_matmul(x_RK.astype(dtype), w_GKN.astype(dtype), groups)
  return made.astype(dtype)


def _chosen(rows: Array, w_GKN: Array, block: int) -> str:
  """The grouped matmul that will serve, if rows are aligned to a block."""
  only_static: Any = None
  groups = Groups(only_static, only_static, block)
  varies = bool(axes_of(rows))  # as they all do by now
  return choose(current_device(), groups, w_GKN.shape[0], rows.dtype, varies=varies)[0]


def _checked(lhs, rhs, sizes, precision, preferred, offset) -> tuple[Any, Any]:
  """The dtypes of the operands and of the result.

  Raises:
    ValueError: on one line.
  """
  fits = lhs.ndim == 2 and rhs.ndim == 3 and lhs.shape[1] == rhs.shape[1]
  if not fits or sizes.shape != rhs.shape[:1]:
    raise ValueError(
      f"ragged_dot: lhs {lhs.shape}, rhs {rhs.shape}, group_sizes {sizes.shape}; give "
      "[m, k], [g, k, n] and [g]."
    )
  common = lhs.dtype
  if lhs.dtype != rhs.dtype:
    common = max(lhs.dtype, rhs.dtype, key=lambda dtype: dtype.itemsize)
    if lhs.dtype.itemsize == rhs.dtype.itemsize or not _floating(lhs, rhs):
      raise ValueError(
        f"ragged_dot: lhs is {lhs.dtype} and rhs {rhs.dtype}; cast one of them."
      )
  if not jnp.issubdtype(sizes.dtype, jnp.integer):
    raise ValueError(f"ragged_dot: group_sizes is {sizes.dtype}; give integers.")
  if precision not in (None, "default", jax.lax.Precision.DEFAULT):
    raise ValueError(
      f"ragged_dot: precision={shown(precision)}; leave it out, or cast the operands "
      "to a wider dtype."
    )
  if offset is not None:
    raise ValueError("ragged_dot: group_offset is not supported; slice rhs instead.")
  try:
    dtype = common if preferred is None else jnp.dtype(preferred)
  except TypeError:
    raise ValueError(
      f"ragged_dot: preferred_element_type={preferred!r} is no dtype; give {common}."
    ) from None
  widest = jnp.dtype(wide(lhs, rhs))
  narrower = _floating(common, dtype) and dtype.itemsize < common.itemsize
  if dtype not in (common, widest) and not narrower:
    raise ValueError(
      f"ragged_dot: preferred_element_type={dtype} of {common} operands; give "
      f"{common} or {widest}."
    )
  return common, dtype


def _floating(*of: Any) -> bool:
  """Whether all arrays or dtypes are of real numbers."""
  return all(jnp.issubdtype(jnp.result_type(one), jnp.floating) for one in of)
