"""Soft MoE: every slot reads all tokens, every token all slots."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Context, Mixing
from jmoe.use import marked


@marked(choices=lambda num_experts, **_: None, causal=False, dense=True)
def soft(
  logits: Array,
  scores: Array | None = None,
  select: Array | None = None,
  *,
  context: Context = Context(),
) -> Mixing:
  """Dispatch is a softmax over tokens, combine one over all slots of all experts.

  Puigcerver et al. 2023 (arXiv 2308.00951), equations 1 and 3, per row.  Not causal.

  Args:
    logits: f32[G,S,E,C] from `gates.slots`.
    scores, select: not read.
    context: `valid` bool[T]; padding feeds no slot and gets zero.

  Returns:
    Mixing; a row without valid tokens is all zero.
  """
  del scores, select
  G, S, E, C = logits.shape
  valid = jnp.ones((G, S), bool)
  if context.valid is not None:
    valid = context.valid.reshape(G, S)
  valid = valid[:, :, None, None]
  # A finite floor: a row of padding alone gives zeros, not NaN.
  dispatch = jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=1)
  combine = jax.nn.softmax(logits.reshape(G, S, E * C), axis=2).reshape(logits.shape)
  return Mixing(jnp.where(valid, dispatch, 0), jnp.where(valid, combine, 0))
