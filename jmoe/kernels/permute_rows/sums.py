"""Rows of the expert buffer summed per token: a gather for each choice, no scatter."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.permute_rows.reference import take
from jmoe.types import Layout, wide


@jax.named_scope("rows")
def summed(rows_RD: Array, layout: Layout, weight_N: Array | None = None) -> Array:
  """`[T,D]` the sum of each token's rows, in at least float32.

  Only where tokens differ in how many experts chose them (expert choice) is anything
  added into tokens.

  Args:
    rows_RD: rows that no assignment owns are not read.
    layout: where each assignment's row is.
    weight_N: a coefficient per assignment; None: one.
  """
  dtype, num_tokens = wide(rows_RD), layout.num_tokens
  if layout.k is None:
    weight_R = (
      jnp.ones(layout.num_rows, dtype)
      if weight_N is None
      else take(weight_N, layout.entry).astype(dtype)
    )
    padded = jax.ops.segment_sum(
      jnp.where((layout.token < num_tokens)[:, None], rows_RD, 0).astype(dtype)
      * weight_R[:, None],
      layout.token,
      num_tokens + 1,
    )
    return padded[:num_tokens]
  # One choice rank at a time: [T,K,D] never exists, and XLA makes one kernel of all.
  row_TK = layout.row.reshape(num_tokens, layout.k)
  total_TD = jnp.zeros((num_tokens, rows_RD.shape[1]), dtype)
  for j in range(layout.k):
    part_TD = take(rows_RD, row_TK[:, j]).astype(dtype)
    if weight_N is not None:
      part_TD *= weight_N.reshape(row_TK.shape)[:, j, None].astype(dtype)
    total_TD += part_TD
  return total_TD
