"""No gate: for routers that do not ask one (hashed, every expert)."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe.types import Context, Params, wide
from jmoe.use import marked


@marked(constant=True)
def none(params: Params, x_TD: Array, context: Context, *, num_experts: int) -> Array:
  """Logits of zero: every expert is liked alike, and nothing is learned.

  Args:
    params: not read; there are none.
    x_TD: activations; only their number is read.
    context: not read.
    num_experts: E, given by the layer.

  Returns:
    f32[T,E] zeros.
  """
  del params, context
  return jnp.zeros((x_TD.shape[0], num_experts), wide(x_TD))
