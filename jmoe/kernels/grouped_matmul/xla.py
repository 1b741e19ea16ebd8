"""Grouped matmuls that XLA provides."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.grouped_matmul.reference import expert_of_rows
from jmoe.types import Groups


def batched(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  """Equal groups as one batched product; rows past `E * capacity` give zero."""
  E, D, F = w_EDF.shape
  assert groups.capacity is not None
  used = E * groups.capacity  # experts after the E-th, if any, are not ours
  x_ECD = x_RD[:used].reshape(E, groups.capacity, D)
  y_ECF = jnp.einsum("ECD,EDF->ECF", x_ECD, w_EDF)
  if bias_EF is not None:
    y_ECF = y_ECF + bias_EF[:, None].astype(y_ECF.dtype)
  y_RF = y_ECF.reshape(used, F)
  return jnp.pad(y_RF, ((0, x_RD.shape[0] - used), (0, 0)))


def ragged_dot(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  """`jax.lax.ragged_dot` over block-aligned groups."""
  R, E = x_RD.shape[0], w_EDF.shape[0]
  if groups.capacity is not None:
    sizes_E = jnp.full(E, groups.capacity, jnp.int32)
  else:
    sizes_E = -(-groups.rows // groups.block) * groups.block
  y_RF = jax.lax.ragged_dot(x_RD, w_EDF, sizes_E)
  # Rows past the last group are undefined on some backends.
  used_R1 = (jnp.arange(R, dtype=jnp.int32) < jnp.sum(sizes_E, dtype=jnp.int32))[
    :, None
  ]
  y_RF = jnp.where(used_R1, y_RF, 0)
  if bias_EF is not None:
    own_RE = jax.nn.one_hot(expert_of_rows(groups, R), E, dtype=bias_EF.dtype)
    bias_RF = jnp.einsum(
      "RE,EF->RF", own_RE, bias_EF, precision=jax.lax.Precision.HIGHEST
    )
    y_RF = y_RF + bias_RF.astype(y_RF.dtype)
  return y_RF
