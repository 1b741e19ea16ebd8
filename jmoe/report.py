"""What a layer says about itself: losses, load, drops by cause, entropy."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.losses import loss_name
from jmoe.losses.total import batches_of_update
from jmoe.types import Context, Info, Mixing, Plan, State, valid_or_all


@jax.named_scope("report")
def report(
  config: Any,
  plan: Plan,
  context: Context,
  state: State,
  train: bool,
  axes: tuple[str, ...] | None,
  with_plan: bool,
) -> Info:
  """The `Info` of a plan; sums go over mesh `axes` if there are any."""

  def total(x: Array) -> Array:
    return jax.lax.psum(x, axes) if axes else x

  routing = plan.routing
  load_E = total(jnp.sum(plan.load, axis=0, dtype=jnp.int32))
  masked = routing.masked
  asked = routing.live if masked is None else routing.live | masked
  whole = jnp.maximum(total(_count(asked)), 1)
  dropped = {plan.cause: total(_count(routing.live & ~plan.kept)) / whole}
  none = jnp.zeros((), jnp.float32)
  dropped["restriction"] = none if masked is None else total(_count(masked)) / whole
  valid_T = valid_or_all(context, routing.num_tokens).astype(jnp.float32)
  entropy_T = _entropy(jax.lax.stop_gradient(routing.probs)).astype(jnp.float32)
  num_valid = jnp.maximum(total(jnp.sum(valid_T)), 1)
  if train and config.balance is not None:
    state = dataclasses.replace(state, bias=config.balance(state.bias, load_E))
  given = dict(axes=axes, before=state.counted if train else None)
  if train and state.counted is not None:
    state = _counted(state, load_E, batches_of_update(config.losses))
  return Info(
    losses={loss_name(f): f(plan, context, **given) for f in config.losses},
    load=load_E,
    dropped=dropped,
    entropy=total(jnp.sum(entropy_T * valid_T)) / num_valid,
    state=state,
    plan=plan if with_plan else None,
  )


def report_mixing(
  mixing: Mixing, state: State, axes: tuple[str, ...] | None, with_plan: bool
) -> Info:
  """The `Info` of Soft MoE: full slots, no drops, no losses."""

  def total(x: Array) -> Array:
    return jax.lax.psum(x, axes) if axes else x

  G, S, E, C = mixing.combine.shape
  share_TE = jnp.sum(jax.lax.stop_gradient(mixing.combine), axis=3).reshape(G * S, E)
  weight_T = jnp.sum(share_TE, axis=1)  # one for a valid token, else zero
  num_valid = jnp.maximum(total(jnp.sum(weight_T)), 1)
  entropy = total(jnp.sum(_entropy(share_TE) * weight_T)) / num_valid
  return Info(
    losses={},
    load=total(jnp.full(E, G * C, jnp.int32)),
    dropped={},
    entropy=entropy,
    state=state,
    plan=mixing if with_plan else None,
  )


def _counted(state: State, load_E: Array, batches: int) -> State:
  """The state with this batch's choices, or with none where an update ends."""
  assert state.counted is not None and state.batches is not None
  ends = state.batches + 1 >= batches
  return dataclasses.replace(
    state,
    counted=jnp.where(ends, 0, state.counted + load_E),
    batches=jnp.where(ends, 0, state.batches + 1),
  )


def _count(mask: Array) -> Array:
  return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def _entropy(scores_TE: Array) -> Array:
  """Nats, of each row divided by its sum."""
  total_T1 = jnp.sum(scores_TE, axis=1, keepdims=True)
  p_TE = scores_TE / jnp.where(total_T1 > 0, total_T1, 1)
  return -jnp.sum(jax.scipy.special.xlogy(p_TE, p_TE), axis=1)
