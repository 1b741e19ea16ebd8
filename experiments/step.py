"""One step of training and of evaluation: pure functions, jitted by their callers."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from experiments import routing
from experiments.optim import Optimizer
from experiments.state import Blueprint, TrainState
from jmoe.losses import total_loss
from jmoe.types import Info

Metrics = dict[str, Array]


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  *,
  blueprint: Blueprint,
  optimizer: Optimizer,
  loss_weights: tuple[tuple[str, float], ...],
  logits_z_loss: float = 0.0,
  loss_chunk: int | None = None,
  byte_lengths: ArrayLike | None = None,
) -> tuple[TrainState, Metrics, tuple[routing.Stack, ...]]:
  """The state one step later, f32[] metrics of the step, what the routers did.

  A step whose loss or gradient is not finite changes nothing but the counts of steps
  and of skipped steps: `metrics["skipped"]` is then one.

  Args:
    state: parameters and all else; donate it.  Stacked under `jax.vmap`: see
      `experiments.seeds`.
    batch: i32[B,S] arrays of `experiments.data.batches`.  Only `scored` tokens have a
      loss; routing losses and loads are of all.
    blueprint: structure of the model.
    optimizer: made for the same parameters.
    loss_weights: of the routing losses that are added to the cross-entropy, by name.
    logits_z_loss: weight of the mean squared log of the softmax's denominator, over
      scored tokens (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    loss_chunk: tokens whose logits exist at once; see `jmoe.models.cross_entropy`.
    byte_lengths: i32[V] bytes that a token stands for, for `bits_per_byte`; None: each
      token is a byte.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

  def objective(params):
    model = blueprint.model(params, state.balance)
    x_BSD, infos = model.hidden(
      batch["inputs"], batch["segment"], batch["position"], key=key, train=True
    )
    counts_BS = counted(batch)
    weight_BS = counts_BS / jnp.maximum(jnp.sum(counts_BS), 1)
    loss, nats_BS = model.cross_entropy(
      x_BSD, batch["targets"], weight_BS, z_loss=logits_z_loss, chunk=loss_chunk
    )
    # A dense model, trained for comparison, reports no losses to weigh.
    if infos:
      loss += total_loss(infos, dict(loss_weights))
    return loss, (jnp.sum(nats_BS), counts_BS, infos)

  (loss, (nats, counts_BS, infos)), grads = jax.value_and_grad(objective, has_aux=True)(
    state.params
  )
  grads = optimizer.trained(grads)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, moments = optimizer.update(grads, state.optimizer, state.params)
  with jax.numpy_dtype_promotion("standard"):  # float32 updates of narrower parameters
    params: Any = optax.apply_updates(state.params, updates)
  # Of the new parameters: some gates are read off the experts after each step.
  balance = blueprint.balanced(params, state.balance, infos)
  params, balance, moments = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (params, balance, moments),
    (state.params, state.balance, state.optimizer),
  )
  skipped = state.skipped + (~finite).astype(jnp.int32)
  new = TrainState(state.step + 1, skipped, state.key, params, balance, moments)
  size_BS = counts_BS
  if byte_lengths is not None:
    size_BS *= jnp.asarray(byte_lengths, jnp.float32)[batch["targets"]]
  metrics = {
    "loss": loss,
    "bits_per_byte": nats / jnp.log(2.0) / jnp.maximum(jnp.sum(size_BS), 1),
    "gradient_norm": norm,
    "skipped": (~finite).astype(jnp.float32),
    **routing_metrics(infos),
  }
  return new, metrics, routing.stacks(infos)


def eval_step(
  params: dict[str, Array],
  balance: dict[str, Array],
  batch: dict[str, Array],
  byte_lengths: ArrayLike,
  *,
  blueprint: Blueprint,
  num_domains: int,
  loss_chunk: int | None = None,
) -> tuple[Array, Array, tuple[Array, ...]]:
  """Sums by domain of scored tokens: nats, bytes, and choices of experts.

  Args:
    params: of the model.
    balance: of the model.
    batch: i32[B,S] arrays of `experiments.data.one_pass`.
    byte_lengths: i32[V] bytes that a token stands for; 0 for the end of a document,
      which so is paid for but not counted.
    blueprint: structure of the model.
    num_domains: of the data set.
    loss_chunk: as for `train_step`.

  Returns:
    f32[domains], i32[domains], and i32[R,domains,E] for each stack of R sparse layers:
    each scored token counts once in every layer for each expert that it asks for.
    `routing.by_depth` unpacks them.
  """
  scored_T = ((batch["segment"] > 0) & (batch["scored"] > 0)).reshape(-1)

  def look(plan):
    domain_T = batch["domain"].reshape(-1)
    return routing.load_by_domain(plan, domain_T, scored_T, num_domains=num_domains)

  model = blueprint.model(params, balance)
  x_BSD, infos = model.hidden(
    batch["inputs"], batch["segment"], batch["position"], look=look
  )
  counts_BS = counted(batch)
  _, nats_BS = model.cross_entropy(x_BSD, batch["targets"], counts_BS, chunk=loss_chunk)
  lengths_BS = jnp.asarray(byte_lengths, jnp.int32)[batch["targets"]]
  bytes_BS = jnp.where(counts_BS > 0, lengths_BS, 0)
  in_domain = batch["domain"] == jnp.arange(num_domains)[:, None, None]
  return (
    jnp.sum(jnp.where(in_domain, nats_BS, 0.0), axis=(1, 2)),
    jnp.sum(jnp.where(in_domain, bytes_BS, 0), axis=(1, 2), dtype=jnp.int32),
    tuple(info.plan for info in infos),
  )


def counted(batch: dict[str, Array]) -> Array:
  """f32[B,S]: 1 where a token's loss counts, 0 elsewhere."""
  return ((batch["segment"] > 0) & (batch["scored"] > 0)).astype(jnp.float32)


def routing_metrics(infos: Sequence[Info]) -> Metrics:
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
