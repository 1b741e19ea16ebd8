"""What tuning asks of a kind of model: how it is cut into groups, its loss, its score.

`encoder` and `decoder` are modules that answer; the configuration says which one does.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jax import Array

from jmoe import gates
from jmoe.config import ModelConfig
from jmoe.models.encoder import EncoderConfig

Config = EncoderConfig | ModelConfig
Orders = dict[int, np.ndarray]  # of each layer cut: see `cluster.split`


class Kind(Protocol):
  """A kind of model; arrays are by dotted name."""

  @staticmethod
  def grouped(
    dense: Any,
    *,
    groups: int,
    k: int,
    layers: tuple[int, ...],
    partition: str,
    gate: str,
  ) -> tuple[Any, Orders]:
    """A dense model with some layers in groups, hidden units masked where they are."""
    ...

  @staticmethod
  def joined(model: Any, orders: Orders, dense: Any) -> dict[str, Any]:
    """Parameters of the dense model, hidden units where they were; traceable."""
    ...

  @staticmethod
  def cut(
    params: Mapping[str, Any], like: Any, orders: Orders, dense: Any
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, state) of a dense model, cut as another was; traceable.

    Args:
      params: of the dense model.
      like: with a gate of means.
      orders: of that one.
      dense: configuration of the dense model.
    """
    ...

  @staticmethod
  def head(key: Array, config: Any) -> dict[str, Array]:
    """What is trained beside the model; of no arrays if it is whole."""
    ...

  @staticmethod
  def loss(
    params: Mapping[str, Array],
    state: Mapping[str, Array],
    head: Mapping[str, Array],
    rows: Mapping[str, Array],
    config: Any,
  ) -> tuple[Array, Any]:
    """(f32[] the mean loss of some rows in training, what sparse layers report)."""
    ...

  @staticmethod
  def score(
    params: Mapping[str, Array],
    state: Mapping[str, Array],
    head: Mapping[str, Array],
    rows: Mapping[str, Array],
    config: Any,
  ) -> Array:
    """[B]: what each row adds to a sum: right or wrong, or nats."""
    ...


def of(config: Config) -> Kind:
  """The kind of a model."""
  if isinstance(config, ModelConfig):
    from experiments.emoe import decoder

    return decoder
  from experiments.emoe import encoder

  return encoder


def means(experts: Mapping[str, Array]) -> Array:
  """f32[...,E,D]: the mean key of each group."""
  return gates.keys.buffers(experts)["key_ED"]  # type: ignore[attr]
