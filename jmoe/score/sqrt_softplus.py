"""Scores that grow like a square root."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array


def sqrt_softplus(logits_TE: Array) -> Array:
  """`sqrt(log(1 + exp(l)))`, positive and unbounded.

  Args:
    logits_TE: f32[T,E].

  Returns:
    f32[T,E], each positive.
  """
  # Bounded away from zero: the root's slope is infinite there, and inf * 0 is NaN.
  return jnp.sqrt(jnp.maximum(jax.nn.softplus(logits_TE), 1e-30))
