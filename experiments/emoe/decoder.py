"""A language model of ours, which goes on learning to predict; see `kinds.Kind`."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from experiments.emoe import kinds
from experiments.step import counted
from jmoe import dispatch, surgery
from jmoe.config import ModelConfig
from jmoe.parameters import init_state
from jmoe.surgery import Layer, Model, cluster, dense as feed_forwards
from jmoe.surgery.frame import blueprint
from jmoe.use import use


def grouped(
  dense: Model,
  *,
  groups: int,
  k: int,
  layers: tuple[int, ...],
  partition: str,
  gate: str,
) -> tuple[Model, kinds.Orders]:
  found = cluster.cluster(
    dense,
    num_experts=groups,
    k=k,
    blocks_changed=layers,
    partition=partition,
    gate=gate,
  )
  return surgery.on_layers(found.model, _masked), dict(
    zip(sorted(layers), found.orders, strict=True)
  )


def _masked(number: int, layer: Layer) -> Layer:
  del number
  config = dataclasses.replace(layer.config, dispatch=use(dispatch.mask))
  return layer._replace(config=config)


def joined(model: Model, orders: kinds.Orders, dense: ModelConfig) -> dict[str, Any]:
  each = [orders[n] for n in sorted(orders)]
  return dict(cluster.merged(cluster.Clustered(model, each, dense)).params)


def cut(
  params: Mapping[str, Any], like: Model, orders: kinds.Orders, dense: ModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
  parts, own = surgery.blocks(Model(dense, params)), surgery.blocks(like)
  for n, order_F in orders.items():
    config = own[n].layer.config
    matrices = feed_forwards.of_block(parts[n])
    experts = {"experts": cluster.stacked(matrices, order_F, config.num_experts)}
    parts[n] = parts[n].with_layer(Layer(config, experts, init_state(config, experts)))
  made = surgery.rebuilt(Model(dense, params), parts)
  return dict(made.params), dict(made.state)


def head(key: Array, config: ModelConfig) -> dict[str, Array]:
  del key, config
  return {}


def loss(params, state, head, rows, config: ModelConfig) -> tuple[Array, Any]:
  """Nats of a scored token; rows are those of `experiments.data`, i32[B,S] each."""
  del head
  counts_BS = counted(rows)
  weight_BS = counts_BS / jnp.maximum(jnp.sum(counts_BS), 1)
  model = blueprint(config).model(dict(params), dict(state))
  given = rows["inputs"], rows["segment"], rows["position"]
  x_BSD, infos = model.hidden(*given, train=True)
  return model.cross_entropy(x_BSD, rows["targets"], weight_BS)[0], infos


def score(params, state, head, rows, config: ModelConfig) -> Array:
  """f32[B]: nats of the scored tokens of each row."""
  del head
  model = blueprint(config).model(dict(params), dict(state))
  x_BSD, _ = model.hidden(rows["inputs"], rows["segment"], rows["position"])
  _, nats_BS = model.cross_entropy(x_BSD, rows["targets"], counted(rows))
  return jnp.sum(nats_BS, axis=1)
