"""Plans of what one device serves: entries that came from others, queued anew."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax.numpy as jnp
from jax import Array

from jmoe.assign import assign
from jmoe.types import Context, Plan, Routing


def requeue(
  expert_N: Array,
  token_N: Array,
  num_experts: int,
  num_tokens: int,
  k: int | None,
  bound: int | None = None,
) -> Plan:
  """A dropless plan of entries of which some are of no expert.

  Args:
    expert_N: i32[N], entry -> expert; outside `[0, num_experts)`: does not run.
    token_N: i32[N], entry -> token.
    num_experts: of the plan.
    num_tokens: of the plan.
    k: entries of each token, which then lie in token order; None: any number.
    bound: entries that run at most, if that is known: the buffer is made for so many.
  """
  live_N = (expert_N >= 0) & (expert_N < num_experts)
  nothing = jnp.zeros((num_tokens, num_experts), jnp.float32)  # no loss reads this plan
  routing = Routing(
    token=token_N,
    expert=jnp.where(live_N, expert_N, 0),
    weight=live_N.astype(jnp.float32),
    live=live_N,
    queues=live_N,
    probs=nothing,
    logits=nothing,
    k=k,
  )
  return dataclasses.replace(assign(routing, Context()), max_rows=bound)
