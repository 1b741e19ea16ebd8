"""One key per token, whatever device the token is on."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Context


def per_token(
  draw: Callable[[Array], Array], key: Array, context: Context, num_tokens: int
) -> Array:
  """`draw(key_t)` for every token, its key folded with its global position."""
  position = context.position
  if position is None:
    position = jnp.arange(num_tokens, dtype=jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
  return jax.vmap(draw)(keys)
