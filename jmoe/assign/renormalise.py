"""What a token's weights sum to: `(plan) -> plan`, with weights made anew.

After any of these but `never` and `ones`, weights that count sum to `routing.scale`.
With one choice a token that is a constant, so a configuration with a learned gate is
refused.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Plan
from jmoe.use import fact, marked


def _check(config) -> None:
  if config.k is None:
    raise ValueError(
      f"renormalise: {config.router.name} has no fixed number of choices per token; "
      "use use(renormalise.never)."
    )
  _learns(config, config.k)


def _check_live(config) -> None:
  """The same where a choice that is skipped has no share."""
  _check(config)
  runs = fact(config.router, "runs", lambda **_: config.k)
  _learns(config, runs(**config.router.kwargs))


def _learns(config, weighed: int) -> None:
  """A lone weight divided by itself is a constant, and the gate has no gradient."""
  learned = fact(config.gate, "init") and not fact(config.router, "fixed")
  if weighed == 1 and config.num_experts > 1 and learned:
    raise ValueError(
      f"renormalise={config.renormalise!r} with router={config.router!r}: one weight a "
      "token is then constant and the gate does not learn; use "
      "renormalise=use(renormalise.never)."
    )


def _check_ones(config) -> None:
  if fact(config.gate, "init") and not fact(config.router, "fixed"):
    raise ValueError(
      f"renormalise=ones with gate={config.gate!r}: weights are constant and the gate "
      "does not learn; use gates.keys, or another renormalise."
    )


def _with_weight(plan: Plan, weight_TK: Array) -> Plan:
  routing = dataclasses.replace(plan.routing, weight=weight_TK.reshape(-1))
  return dataclasses.replace(plan, routing=routing)


def _share(plan: Plan, counted: Array) -> Plan:
  k = plan.routing.k
  assert k is not None
  weight_TK = jnp.where(counted, plan.routing.weight, 0).reshape(-1, k)
  # By the largest first: the sum's square, which the gradient of a quotient needs,
  # would underflow for weights of 1e-30.
  largest_T1 = jax.lax.stop_gradient(jnp.max(weight_TK, axis=1, keepdims=True))
  weight_TK = weight_TK / jnp.where(largest_T1 > 0, largest_T1, 1)
  total_T1 = jnp.sum(weight_TK, axis=1, keepdims=True)
  # `where` on both sides: a token without choices gets zero, not NaN, and so does
  # its gradient.
  safe_T1 = jnp.where(total_T1 > 0, total_T1, 1)
  return _with_weight(
    plan, jnp.where(total_T1 > 0, weight_TK / safe_T1, 0) * plan.routing.scale
  )


def never(plan: Plan) -> Plan:
  """The scores as they are: Switch, V-MoE, Grok-1, OLMoE, DeepSeek-V2."""
  return plan


@marked(check=_check)
def before_dropping(plan: Plan) -> Plan:
  """Weights sum to `scale` over the choices; a dropped or skipped one loses its share.

  GShard (arXiv 2006.16468), Tutel; without dropping also Mixtral, DBRX, Qwen3-MoE and,
  with sigmoid scores and scale 2.5, DeepSeek-V3.
  """
  chosen = plan.routing.chosen
  return _share(plan, plan.routing.live if chosen is None else chosen)


@marked(check=_check_live)
def after_dropping(plan: Plan) -> Plan:
  """Weights sum to `scale` over the choices that found a slot (fairseq, DeepSpeed)."""
  return _share(plan, plan.kept)


@marked(check=_check_live)
def over_chosen(plan: Plan) -> Plan:
  """A softmax over the chosen logits: Mixtral's and gpt-oss's own formula.

  Equal to softmax, top-k and `before_dropping` up to rounding, and defined for any
  score.  It reads the logits that were scored, noise included.
  """
  from jmoe.routers.token_choice import pick

  routing = plan.routing
  assert routing.k is not None
  logits = routing.logits if routing.noisy_logits is None else routing.noisy_logits
  chosen_TK = pick(logits, routing.expert.reshape(-1, routing.k))
  live_TK = routing.live.reshape(chosen_TK.shape)
  share_TK = jax.nn.softmax(jnp.where(live_TK, chosen_TK, -1e30), axis=1)
  return _with_weight(plan, jnp.where(live_TK, share_TK, 0) * routing.scale)


@marked(check=_check_ones)
def ones(plan: Plan) -> Plan:
  """Every choice weighs `scale`: scores select and do nothing else.

  EMoE (arXiv 2310.10908), whose groups of hidden units together are the dense
  feed-forward that they were cut from.
  """
  routing = plan.routing
  weight_N = jnp.where(routing.live, routing.scale, 0).astype(routing.weight.dtype)
  return _with_weight(plan, weight_N)
