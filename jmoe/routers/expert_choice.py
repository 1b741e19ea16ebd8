"""Experts take their best tokens: balanced by construction, not causal."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.assign import capacity
from jmoe.types import Context, Routing, num_groups, valid_or_all
from jmoe.use import marked


def _check(config, *, capacity_factor: float = 2.0, rule=capacity.ceil) -> None:
  del rule
  capacity.check_factor("expert_choice", "capacity_factor", capacity_factor)


def _slots(
  tokens: int, num_experts: int, *, capacity_factor: float = 2.0, rule=capacity.ceil
) -> int:
  """How many tokens of a group an expert takes at most."""
  return min(tokens, int(rule(tokens, num_experts, 1, capacity_factor)))


@marked(check=_check, choices=lambda num_experts, **_: None, causal=False, slots=_slots)
def expert_choice(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  mask: Array | None = None,
  context: Context = Context(),
  forced: Array | None = None,
  capacity_factor: float = 2.0,
  rule=capacity.ceil,
) -> Routing:
  """Each expert takes its `T * capacity_factor / E` best tokens of every group.

  Zhou et al. 2022 (arXiv 2202.09368), section 3.2: scores are a softmax over experts,
  weights those scores without renormalisation; a token may get any number of experts.
  A token's outcome depends on the others of its group, later ones included: not for
  causal models.  The number counts valid tokens only, so padding changes nothing.

  Args:
    logits, scores, select: f32[T,E].
    mask: bool[T,E] tokens an expert may take.
    context: `valid`, `group_size`.
    forced: i32[G,E,C] recorded tokens (indices into T) to replay; -1 for none.  A token
      of another group counts as outside the mask.
    capacity_factor: experts per token on average.
    rule: a capacity rule, called with k=1.

  Returns:
    Routing with G*E*C entries ordered by group, expert and preference, `k=None`.
  """
  T, E = scores.shape
  S = context.group_size or T
  G = num_groups(T, context.group_size)
  C = _slots(S, E, capacity_factor=capacity_factor, rule=rule)
  pad = ((0, G * S - T), (0, 0))
  usable_TE = jnp.broadcast_to(valid_or_all(context, T)[:, None], (T, E))
  count_G = jnp.sum(
    jnp.pad(usable_TE[:, 0], pad[0]).reshape(G, S), axis=1, dtype=jnp.int32
  )
  taken_G = capacity.of_valid(count_G, S, lambda n: rule(n, E, 1, capacity_factor))
  if mask is not None:
    usable_TE = usable_TE & mask
  select_TE = jnp.where(usable_TE, jax.lax.stop_gradient(select), -jnp.inf)
  select_GES = jnp.pad(select_TE, pad, constant_values=-jnp.inf)
  select_GES = select_GES.reshape(G, S, E).transpose(0, 2, 1)
  best_GEC, place_GEC = jax.lax.top_k(select_GES, C)
  token_GEC = place_GEC + (jnp.arange(G, dtype=jnp.int32) * S)[:, None, None]
  live_GEC = (jnp.arange(C, dtype=jnp.int32) < taken_G[:, None, None]) & (
    best_GEC > -jnp.inf
  )
  masked = None
  if forced is not None:
    # Those of another group would take rows of its buffer.
    start_G11 = jnp.arange(G, dtype=jnp.int32)[:, None, None] * S
    own_GEC = (forced >= start_G11) & (forced < jnp.minimum(start_G11 + S, T))
    masked = ((forced != -1) & ~own_GEC).reshape(-1)
    token_GEC, live_GEC = forced, own_GEC
  token = jnp.clip(token_GEC, 0, T - 1).reshape(-1).astype(jnp.int32)
  expert = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[:, None], (G, E, C)).reshape(
    -1
  )
  live = live_GEC.reshape(-1)
  return Routing(
    token=token,
    expert=expert.astype(jnp.int32),
    weight=jnp.where(live, scores[token, expert], 0),
    live=live,
    queues=live,
    masked=masked,
    probs=scores,
    logits=logits,
    group_size=context.group_size,
    capacity=C,
  )
