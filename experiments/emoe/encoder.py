"""A pretrained encoder under a new head, which labels texts; see `kinds.Kind`."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.emoe import kinds
from jmoe import dispatch
from jmoe.config import MoEConfig
from jmoe.models.encoder import EncoderConfig, mean_pool
from jmoe.surgery import cluster, encoders
from jmoe.surgery.encoders import EncoderModel
from jmoe.use import use

DENSE = {"up": "up.kernel", "up_bias": "up.bias", "down": "down.kernel"}


def grouped(
  dense: EncoderModel,
  *,
  groups: int,
  k: int,
  layers: tuple[int, ...],
  partition: str,
  gate: str,
) -> tuple[EncoderModel, kinds.Orders]:
  found = encoders.grouped(
    dense,
    num_experts=groups,
    k=k,
    layers_changed=layers,
    partition=partition,
    gate=gate,
  )
  ffs = tuple(
    dataclasses.replace(ff, dispatch=use(dispatch.mask))
    if isinstance(ff, MoEConfig)
    else ff
    for ff in found.model.config.feed_forwards
  )
  config = dataclasses.replace(found.model.config, feed_forwards=ffs)
  return found.model._replace(config=config), found.orders


def joined(
  model: EncoderModel, orders: kinds.Orders, dense: EncoderConfig
) -> dict[str, Any]:
  del dense
  return dict(encoders.ungrouped(encoders.Grouped(model, orders)).params)


def cut(
  params: Mapping[str, Any],
  like: EncoderModel,
  orders: kinds.Orders,
  dense: EncoderConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
  del dense
  params, state = dict(params), {}
  for n, order_F in orders.items():
    at, ff = f"layers.{n}.", like.config.feed_forwards[n]
    assert isinstance(ff, MoEConfig)
    matrices = {own: params.pop(at + name) for own, name in DENSE.items()}
    experts = cluster.stacked(matrices, order_F, ff.num_experts)
    params |= {f"{at}moe.experts.{name}": x for name, x in experts.items()}
    params[f"{at}down_bias"] = params.pop(f"{at}down.bias")
    state[f"{at}moe.state.gate.key_ED"] = kinds.means(experts)
  return params, state


def head(key: Array, config: EncoderConfig) -> dict[str, Array]:
  kernel = 0.02 * jax.random.normal(key, (config.d_model, 2))
  return {"kernel": kernel, "bias": jnp.zeros(2)}


def loss(params, state, head, rows, config: EncoderConfig) -> tuple[Array, Any]:
  """Of `tokens`, i32[B,S], 0 is padding, and `label`, i32[B]."""
  logits_B2, infos = _logits(params, state, head, rows["tokens"], config, train=True)
  nats_B = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits_B2, rows["label"]
  )
  return jnp.mean(nats_B), infos


def score(params, state, head, rows, config: EncoderConfig) -> Array:
  """bool[B]: which texts are labelled as they are."""
  logits_B2, _ = _logits(params, state, head, rows["tokens"], config, train=False)
  return jnp.argmax(logits_B2, axis=1) == rows["label"]


def _logits(params, state, head, tokens_BS, config: EncoderConfig, *, train: bool):
  encoder: Any = encoders.blueprint(config).model(dict(params), dict(state))
  valid_BS = tokens_BS > 0
  x_BSD, infos = encoder(tokens_BS, valid_BS, train=train)
  return mean_pool(x_BSD, valid_BS) @ head["kernel"] + head["bias"], infos
