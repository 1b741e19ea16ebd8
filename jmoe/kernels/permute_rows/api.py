"""Which implementation serves which device.

Neither is differentiated: `dispatch.carry` writes each way's gradient as the other way.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.devices import current_device, has_triton
from jmoe.kernels.permute_rows import reference
from jmoe.kernels.row_blocks import in_used_blocks
from jmoe.kernels.varying import like, together
from jmoe.types import Layout


@jax.named_scope("rows")
def take(rows: Array, index: Array) -> Array:
  """`rows[index]`, zero where the index is past the end.

  Args:
    rows: `[N,...]`.
    index: i32 of any shape, not negative.
  """
  if not _served(rows) or index.ndim != 1 or not index.shape[0]:
    return reference.take(rows, index)
  from jmoe.kernels.permute_rows import triton  # imports Pallas

  return triton.take(*together(rows, index))


@jax.named_scope("rows")
def spread(x_TD: Array, layout: Layout, *, block: int | None = None) -> Array:
  """`[R,D]` the token of every row of the expert buffer; padding rows are zero.

  A buffer over a mesh has room for all that could come, most of which stays empty:
  zeros there would be most of what is written.

  Args:
    x_TD: tokens.
    layout: where each of them goes.
    block: rows that whoever reads the buffer reads at once, if those that no expert has
      any of are not read: these then may hold anything.
  """
  if layout.k is None or not _served(x_TD) or not layout.num_rows:
    return take(x_TD, layout.token)
  from jmoe.kernels.permute_rows import triton  # imports Pallas

  token_R, row_TK = layout.token, layout.row.reshape(layout.num_tokens, layout.k)
  if block is not None:
    read_R = in_used_blocks(layout.groups, layout.num_rows, block)
    token_R = jnp.where(read_R, token_R, triton.UNREAD)
  return triton.spread(*together(x_TD, row_TK, token_R))


@jax.named_scope("rows")
def weighed(
  rows_ND: Array, index_R: Array, weight_R: Array, other_RD: Array
) -> tuple[Array, Array]:
  """Rows in another order times a weight, and their products with other rows.

  Args:
    rows_ND: what is read.
    index_R: i32[R] which row; N for none.
    weight_R: f32[R].
    other_RD: `[R,D]`; what stands in rows without an index may be anything.

  Returns:
    `[R,D]` in the dtype of `other`, and f32[R]; of rows without an index the first is
    zero and the second holds no meaning.
  """
  if not _served(rows_ND) or not index_R.shape[0]:
    return reference.weighed(rows_ND, index_R, weight_R, other_RD)
  from jmoe.kernels.permute_rows import triton  # imports Pallas

  return triton.weighed(*together(rows_ND, index_R, weight_R, other_RD))


@jax.named_scope("rows")
def unwritten(rows_ND: Array, num_rows: int) -> Array:
  """`[num_rows, D]` of anything, for an operation that writes into an array.

  XLA makes an array that needs nothing as early as it likes: those of all layers before
  the first is used.  A kernel that does nothing makes it wait for the rows.  Where
  Triton does not serve (narrow rows, other devices, jax before 0.10) it needs nothing.

  Args:
    rows_ND: `[N,D]` what must be there first; the result has its dtype.
    num_rows: of the result.
  """
  if not num_rows or not _served(rows_ND):
    return like(lax.empty((num_rows, rows_ND.shape[1]), rows_ND.dtype), rows_ND)
  from jmoe.kernels.permute_rows import triton  # imports Pallas

  return triton.unwritten(rows_ND, num_rows)


def _served(rows: Array) -> bool:
  """Whether Triton's kernels take them; smaller rows are not worth a program each."""
  if current_device() not in ("ampere", "hopper"):
    return False
  new = jax.__version_info__ >= (0, 10) and has_triton()
  kind = rows.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
  wide = rows.ndim == 2 and rows.shape[0] > 0 and rows.shape[1] >= 128
  return new and kind and wide
