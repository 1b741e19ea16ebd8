"""Gumbel noise: the largest noisy logit is a sample from their softmax."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array

from jmoe.noise._keys import per_token
from jmoe.types import Context
from jmoe.use import marked


@marked(random=lambda train, **_: train)
def gumbel(x: Array, *, context: Context, key: Array) -> Array:
  """`x + Gumbel(0, 1)`; as `select_noise` it is DeepSpeed's RSample.

  Args:
    x: f32[T,E] logits.
    context: `position` i32[T] is folded into the key.
    key: for all tokens.
  """

  def draw(k: Array) -> Array:
    return jax.random.gumbel(k, x.shape[1:], x.dtype)

  return x + per_token(draw, key, context, x.shape[0])
