"""Who comes first in an expert's queue: `(routing, context, key) -> i32[N] or f32[N]`.

Higher comes first; among equals the earlier entry does, that is the earlier token.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.noise._keys import per_token
from jmoe.types import Context, Routing
from jmoe.use import marked


def _needs_k(config) -> None:
  if config.k is None:
    raise ValueError(
      f"priority: {config.router.name} has no choice ranks; use "
      "use(priority.by_weight)."
    )


@marked(levels=lambda routing: routing.k or 1)
def by_choice_rank(routing: Routing, context: Context) -> Array:
  """All first choices before any second one, tokens in order.

  GShard (arXiv 2006.16468), algorithm 1; Switch, V-MoE, DeepSpeed, fairseq.  Routers
  without choice ranks (expert choice) queue in their own order.

  Causal for first choices alone: a later token's first choice comes before an earlier
  token's second one and may take its slot, as in GShard's and fairseq's models.
  """
  del context
  N = routing.expert.shape[0]
  if routing.k is None:
    return jnp.zeros(N, jnp.int32)
  return -(jnp.arange(N, dtype=jnp.int32) % routing.k)


@marked(check=_needs_k, causal=False, levels=lambda routing: routing.expert.shape[0])
def by_confidence(routing: Routing, context: Context) -> Array:
  """Batch-priority routing: within a choice rank, the most confident tokens first.

  V-MoE (arXiv 2106.05974), section 4.1.  Confidence is the weight of the token's first
  choice, for all of its ranks.  Not causal: a later token can displace an earlier one.
  """
  del context
  assert routing.k is not None
  first_T = jax.lax.stop_gradient(routing.weight.reshape(-1, routing.k)[:, 0])
  T = first_T.shape[0]
  # Two stable sorts give exact places; a sum of rank and confidence would round.
  place_T = jnp.argsort(jnp.argsort(-first_T, stable=True)).astype(jnp.int32)
  rank_K = jnp.arange(routing.k, dtype=jnp.int32)
  return -(rank_K[None, :] * T + place_T[:, None]).reshape(-1)


@marked(causal=False)
def by_weight(routing: Routing, context: Context) -> Array:
  """Highest weight first, ranks mixed (Megatron's and DeepSpeed's "probs" policy).

  Not causal: a later token can displace an earlier one.
  """
  del context
  return jax.lax.stop_gradient(routing.weight)


@marked(random=lambda train, **_: True, check=_needs_k, causal=False)
def random(routing: Routing, context: Context, *, key: Array) -> Array:
  """A uniformly random subset survives, in training and outside it.

  Random token selection of Z-Code M3 and DeepSpeed (arXiv 2109.10465).  Keys are folded
  by token position, so every layout keeps the same tokens.  Not causal: a later token
  can displace an earlier one.
  """
  K = routing.k
  assert K is not None

  def draw(k: Array) -> Array:
    return jax.random.uniform(k, (K,), jnp.float32)

  return per_token(draw, key, context, routing.num_tokens).reshape(-1)
