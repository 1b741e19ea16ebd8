"""All rows times all matrices, then a choice: E times the work, obviously right."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.varying import search
from jmoe.types import Groups


def expert_of_rows(groups: Groups, num_rows: int) -> Array:
  """i32[R] the expert whose rows these are; -1 for padding and the unused tail."""
  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  # Of experts that start at the same row only the last one can have rows.
  e_R = search(groups.start, row_R, "right").astype(jnp.int32) - 1
  own_R = row_R - groups.start[e_R] < groups.rows[e_R]
  return jnp.where(own_R, e_R, -1)


def reference(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; zero for rows of no expert."""
  num_experts = w_EDF.shape[0]
  e_R = expert_of_rows(groups, x_RD.shape[0])
  own_RE = jax.nn.one_hot(e_R, num_experts, dtype=x_RD.dtype)
  every_REF = jnp.einsum(
    "RD,EDF->REF", x_RD, w_EDF, precision=jax.lax.Precision.HIGHEST
  )
  if bias_EF is not None:
    every_REF = every_REF + bias_EF
  return jnp.sum(every_REF * own_RE[:, :, None], axis=1)
