"""What every router that lets tokens choose has in common."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import current_device
from jmoe.kernels.top_k import top_k
from jmoe.types import Context, Routing, valid_or_all


@jax.custom_vjp
def pick(values_TE: Array, expert_TK: Array) -> Array:
  """`values_TE[t, expert_TK[t, j]]`, with a gradient that needs no scatter.

  Args:
    values_TE: f32[T,E].
    expert_TK: i32[T,K]; outside `[0, E)` gives zero.

  Returns:
    f32[T,K].
  """
  E = values_TE.shape[1]
  found = jnp.take_along_axis(values_TE, jnp.clip(expert_TK, 0, E - 1), axis=1)
  return jnp.where((expert_TK >= 0) & (expert_TK < E), found, 0)


def _pick_forward(values_TE: Array, expert_TK: Array):
  return pick(values_TE, expert_TK), (expert_TK, values_TE[:0])  # only its width


def _pick_backward(residual, grad_TK: Array):
  expert_TK, E = residual[0], residual[1].shape[1]
  expert_E = jnp.arange(E, dtype=jnp.int32)
  if current_device() != "cpu":
    # XLA fuses the [T,K,E] comparison into the sum; slices would be K launches.
    hit_TKE = expert_TK[:, :, None] == expert_E
    return jnp.sum(jnp.where(hit_TKE, grad_TK[:, :, None], 0), axis=1), None
  # XLA:CPU fuses K passes instead, and takes twenty times as long for the other form.
  grad_TE = jnp.zeros((grad_TK.shape[0], E), grad_TK.dtype)
  for j in range(grad_TK.shape[1]):
    grad_TE += jnp.where(expert_TK[:, j : j + 1] == expert_E, grad_TK[:, j : j + 1], 0)
  return grad_TE, None


pick.defvjp(_pick_forward, _pick_backward)


def choices_of(select_TE: Array, mask_TE: Array | None, k: int) -> Array:
  """i32[T,K] the k highest of `select` within `mask`; ties to the lower index.

  Where fewer than k experts are allowed the rest of the choices lie outside the mask.
  """
  select_TE = jax.lax.stop_gradient(select_TE)
  if mask_TE is not None:
    select_TE = jnp.where(mask_TE, select_TE, -jnp.inf)
  return top_k(select_TE, k)


def token_choice(
  expert_TK: Array,
  *,
  logits: Array,
  scores: Array,
  context: Context,
  mask: Array | None = None,
  forced: Array | None = None,
  weight_TK: Array | None = None,
  live_TK: Array | None = None,
  queues_TK: Array | None = None,
  scale: float = 1.0,
  noisy_logits: Array | None = None,
) -> Routing:
  """A routing in which every token has k entries, in token order.

  Args:
    expert_TK: i32[T,K] chosen experts, best first, each within `[0, E)`.
    logits, scores: f32[T,E] clean logits; what the weights are read from.
    context: `valid` and `group_size` are read.
    mask: bool[T,E] allowed experts; choices outside it are not live.
    forced: i32[T,K] recorded choices that replace `expert_TK` and the mask; -1 stands
      for an unused choice, and no such expert counts as outside the mask.  Weights are
      read anew, so the gradient is today's.
    weight_TK: f32[T,K] weights in place of the scores, before `scale`.
    live_TK: bool[T,K] choices that run; None: all.
    queues_TK: bool[T,K] choices that take a place in the queue; None: those that run.
    scale: multiplies the weights, and is what renormalised weights sum to.
    noisy_logits: f32[T,E] what was scored, if noise was added.
  """
  T, K = expert_TK.shape
  E = scores.shape[1]
  allowed_TK, inside_TK = jnp.ones((T, K), bool), expert_TK
  if forced is not None:
    expert_TK = forced.astype(jnp.int32)
    allowed_TK = (expert_TK >= 0) & (expert_TK < E)
    live_TK = queues_TK = None
    inside_TK = jnp.clip(expert_TK, 0, E - 1)
  elif mask is not None:
    allowed_TK = jnp.take_along_axis(mask, expert_TK, axis=1)
  usable_TK = valid_or_all(context, T)[:, None] & allowed_TK
  live_TK = usable_TK if live_TK is None else usable_TK & live_TK
  queues_TK = live_TK if queues_TK is None else usable_TK & queues_TK
  weighed_TK = pick(scores, expert_TK) if weight_TK is None else weight_TK
  asked_TK = valid_or_all(context, T)[:, None] & ~allowed_TK
  if forced is not None:
    asked_TK &= expert_TK != -1
  return Routing(
    token=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
    expert=inside_TK.reshape(-1),
    weight=(weighed_TK * scale).reshape(-1),
    live=live_TK.reshape(-1),
    queues=queues_TK.reshape(-1),
    probs=scores,
    logits=logits,
    noisy_logits=noisy_logits,
    chosen=usable_TK.reshape(-1),
    masked=None if mask is None and forced is None else asked_TK.reshape(-1),
    k=K,
    scale=scale,
    group_size=context.group_size,
  )


def check_k(config, *, k: int) -> None:
  """Raises unless 1 <= k <= num_experts."""
  if isinstance(k, bool) or not isinstance(k, int) or k < 1:
    raise ValueError(f"k={k!r} must be a whole number of at least 1.")
  if k > config.num_experts:
    raise ValueError(
      f"k={k} is more than num_experts={config.num_experts}; "
      f"use k <= {config.num_experts} or more experts."
    )
