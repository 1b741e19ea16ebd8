"""Groups of hidden units in an `Encoder`, and back; the formulas are in `cluster`."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jmoe.config import Dense, MoEConfig
from jmoe.models.by_name import Blueprint, take_apart
from jmoe.models.encoder import Encoder, EncoderConfig
from jmoe.surgery.cluster import joined, split
from jmoe.surgery.frame import Layer
from jmoe.types import State
from jmoe.use import shown


class EncoderModel(NamedTuple):
  """An `Encoder` as data; arrays of NumPy or of jax."""

  config: EncoderConfig
  params: Mapping[str, Any]  # by dotted name: "layers.0.up.kernel"
  state: Mapping[str, Any] = {}  # gate buffers: "layers.4.moe.state.gate.key_ED"

  def module(self) -> Encoder:
    """The module that computes with these arrays."""
    return blueprint(self.config).model(dict(self.params), dict(self.state))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def blueprint(config: EncoderConfig) -> Blueprint:
  """The structure of an encoder; nothing is computed."""
  return take_apart(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))[0]


class Grouped(NamedTuple):
  """An encoder with some feed-forwards in groups."""

  model: EncoderModel
  orders: dict[int, np.ndarray]  # of each layer changed, see `cluster.split`


def grouped(
  model: EncoderModel,
  *,
  num_experts: int,
  k: int,
  layers_changed: Sequence[int],
  seed: int = 0,
  partition: str = "keys",
  gate: str = "keys",
) -> Grouped:
  """Feed-forwards of some layers in groups; a token takes k of them.

  Args:
    model: with dense layers.
    layers_changed: their numbers.

  The others, and further errors, are those of `cluster.cluster`.

  Raises:
    ValueError: a layer that is sparse or is not there.
  """
  ffs, params, state = list(model.config.feed_forwards), dict(model.params), {}
  state |= dict(model.state)
  orders = {}
  for n in sorted(layers_changed):
    if not 0 <= n < len(ffs) or not isinstance(ffs[n], Dense):
      raise ValueError(
        f"grouped: layers_changed={shown(list(layers_changed))}; give numbers of dense "
        f"layers of the {len(ffs)}."
      )
    dense, at = ffs[n], f"layers.{n}."
    assert isinstance(dense, Dense)
    layer, orders[n] = split(
      {own: params.pop(at + name) for own, name in _DENSE.items()},
      num_experts=num_experts,
      k=k,
      activation=dense.activation,
      seed=seed,
      partition=partition,
      gate=gate,
    )
    params[at + "down_bias"] = params.pop(at + "down.bias")
    for part, arrays in layer.params.items():
      params |= {f"{at}moe.{part}.{name}": x for name, x in arrays.items()}
    state |= {f"{at}moe.state.gate.{name}": x for name, x in layer.state.gate.items()}
    ffs[n] = layer.config
  config = dataclasses.replace(model.config, feed_forwards=tuple(ffs))
  return Grouped(EncoderModel(config, params, state), orders)


def ungrouped(found: Grouped) -> EncoderModel:
  """The dense encoder again, hidden units where they were: to the bit, if untrained."""
  config, params, state = found.model
  ffs, params, state = list(config.feed_forwards), dict(params), dict(state)
  for n, order_F in found.orders.items():
    ff, at = ffs[n], f"layers.{n}."
    assert isinstance(ff, MoEConfig)
    parts = _below(params, f"{at}moe.")
    experts = _below(parts, "experts.")
    matrices = joined(Layer(ff, {"experts": experts}, State()), order_F)
    params = {name: x for name, x in params.items() if not name.startswith(at + "moe.")}
    state = {name: x for name, x in state.items() if not name.startswith(at + "moe.")}
    params |= {at + _DENSE[own]: x for own, x in matrices.items()}
    params[at + "down.bias"] = params.pop(at + "down_bias")
    d_ff = ff.num_experts * ff.experts.get("d_ff")
    ffs[n] = Dense(d_ff, gated=False, activation=ff.experts.get("activation"))
  changed = dataclasses.replace(config, feed_forwards=tuple(ffs))
  return EncoderModel(changed, params, state)


_DENSE = {"up": "up.kernel", "up_bias": "up.bias", "down": "down.kernel"}


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
