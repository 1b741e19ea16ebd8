"""One step of training and of evaluation: pure functions, jitted by their callers."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.state import Blueprint, TrainState, take_apart
from jmoe.losses import total_loss
from jmoe.types import Info

Metrics = dict[str, Array]


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  *,
  blueprint: Blueprint,
  optimizer: optax.GradientTransformation,
  loss_weights: tuple[tuple[str, float], ...],
) -> tuple[TrainState, Metrics]:
  """The state one step later, and f32[] metrics of the step.

  Args:
    state: parameters and all else; donate it.
    batch: i32[B,S] arrays of `experiments.data.batches`.
    blueprint: structure of the model.
    optimizer: made for the same parameters.
    loss_weights: of the routing losses that are added to the cross-entropy, by name.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

  def objective(params):
    model = blueprint.model(params, state.balance)
    logits_BSV, infos = model(
      batch["inputs"], batch["segment"], batch["position"], key=key, train=True
    )
    nats_BS, counts_BS = cross_entropy(logits_BSV, batch)
    nats = jnp.sum(nats_BS) / jnp.maximum(jnp.sum(counts_BS), 1)
    # A dense model, trained for comparison, reports no losses to weigh.
    routing = total_loss(infos, dict(loss_weights)) if infos else jnp.float32(0)
    return nats + routing, (nats, infos)

  (loss, (nats, infos)), grads = jax.value_and_grad(objective, has_aux=True)(
    state.params
  )
  updates, moments = optimizer.update(grads, state.optimizer, state.params)
  params: Any = optax.apply_updates(state.params, updates)
  model = blueprint.model(params, state.balance)
  model.update(infos)
  _, params, balance = take_apart(model)
  new = TrainState(state.step + 1, state.key, params, balance, moments)
  return new, {
    "loss": loss,
    "bits_per_byte": nats / jnp.log(2.0),
    "gradient_norm": optax.global_norm(grads),
    **routing_metrics(infos),
  }


def eval_step(
  params: dict[str, Array],
  balance: dict[str, Array],
  batch: dict[str, Array],
  *,
  blueprint: Blueprint,
  num_domains: int,
) -> tuple[Array, Array]:
  """Sums by domain: (f32[domains] nats, i32[domains] scored bytes, without EOS)."""
  model = blueprint.model(params, balance)
  logits_BSV, _ = model(batch["inputs"], batch["segment"], batch["position"])
  nats_BS, counts_BS = cross_entropy(logits_BSV, batch)
  bytes_BS = counts_BS.astype(bool) & (batch["targets"] < 256)
  in_domain = batch["domain"] == jnp.arange(num_domains)[:, None, None]
  return (
    jnp.sum(jnp.where(in_domain, nats_BS, 0.0), axis=(1, 2)),
    jnp.sum(in_domain & bytes_BS, axis=(1, 2), dtype=jnp.int32),
  )


def cross_entropy(logits_BSV: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
  """(f32[B,S] nats, zero where a token does not count; f32[B,S] 1 where it does)."""
  counts_BS = ((batch["segment"] > 0) & (batch["scored"] > 0)).astype(jnp.float32)
  nats_BS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BSV, batch["targets"]
  )
  return nats_BS * counts_BS, counts_BS


def routing_metrics(infos: tuple[Info, ...]) -> Metrics:
  """Means over layers, and the load of the busiest expert of the worst layer."""
  if not infos:
    return {}
  loads = [info.load.astype(jnp.float32) for info in infos]  # [layers,E] each
  skews = [
    jnp.max(jnp.max(load, -1) / jnp.maximum(jnp.mean(load, -1), 1.0)) for load in loads
  ]
  dropped = [sum(jnp.mean(d) for d in info.dropped.values()) for info in infos]
  losses = [{k: jnp.mean(v) for k, v in info.losses.items()} for info in infos]
  means = jax.tree.map(lambda *x: sum(x) / len(x), *losses)
  return {
    "skew": jnp.max(jnp.stack(skews)),
    "dropped": jnp.mean(jnp.stack([jnp.asarray(d, jnp.float32) for d in dropped])),
    "entropy": jnp.mean(jnp.stack([jnp.mean(info.entropy) for info in infos])),
    **means,
  }
