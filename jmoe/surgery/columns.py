"""The experts of a layer as columns: some of them, or those of several layers together.

What belongs to an expert is told by the letter E of a name: "kernel_DE", "up_EDF".
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import MoEConfig
from jmoe.surgery.frame import Layer
from jmoe.types import State
from jmoe.use import fact, shown

OF_EXPERTS = ("gate", "experts", "aggregate")  # parts in which E counts experts


def take(layer: Layer, experts: Sequence[int], *, k: int | None = None) -> Layer:
  """The layer with these experts, in this order; one may be there more than once.

  Args:
    layer: any whose gate and experts have a part for every expert and nothing between
      two of them.
    experts: numbers of experts.
    k: choices per token; None: as many as before, or as there are experts.

  Returns:
    Equal arrays for equal experts, to the bit; a balance bias goes with its expert.

  Raises:
    ValueError: no such expert, or a layer that cannot be cut so.
  """
  ids, E = np.asarray(experts, np.int64), layer.config.num_experts
  if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= E:
    raise ValueError(
      f"take: experts={shown(list(experts))}; give numbers of 0 to {E - 1}, at least "
      "one."
    )
  check(layer.config)
  k = layer.config.k if k is None else k
  config = resized(layer.config, len(ids), min(k or 1, len(ids)))
  return _each([layer], config, lambda axis, x: x[(slice(None),) * axis + (ids,)])


def together(layers: Sequence[Layer], *, k: int | None = None) -> Layer:
  """One layer with the experts of several, those of the first one first.

  Args:
    layers: alike but for their numbers of experts.  What is not of experts, as a shared
      expert, is the first one's.
    k: choices per token; None: the first one's.

  Raises:
    ValueError: layers that differ in more than their numbers of experts and k.
  """
  for layer in layers:
    check(layer.config)
  first = layers[0].config
  # What numbers of experts bound, as a pool, is least bounded in the layer of most.
  widest = max((layer.config for layer in layers), key=lambda own: own.num_experts)
  for n, layer in enumerate(layers):
    own = layer.config
    alike = resized(widest, own.num_experts, own.k or 1)
    if own.restrict == widest.restrict:  # of few experts it may be less
      own = dataclasses.replace(own, restrict=alike.restrict)
    for field in dataclasses.fields(own):
      given, wanted = getattr(own, field.name), getattr(alike, field.name)
      if given != wanted:
        raise ValueError(
          f"together: layer {n} has {field.name}={shown(given)}; like the one of most "
          f"experts it would have {shown(wanted)}, and only numbers of experts and k "
          "may differ."
        )
  total = sum(layer.config.num_experts for layer in layers)
  config = resized(widest, total, first.k or 1 if k is None else k)
  return _each(layers, config, lambda axis, *xs: concatenated(xs, axis))


def resized(config: MoEConfig, num_experts: int, k: int) -> MoEConfig:
  """The configuration with another number of experts and of choices.

  Raises:
    ValueError: a router without a number of choices.
  """
  if (
    config.k is None
    or "k" not in config.router.kwargs
    and config.router.name
    not in (
      "top_k",
      "noisy_top_k",
    )
  ):
    raise ValueError(
      f"router={config.router!r} has no k that could be changed; experts are added and "
      "taken under routers.top_k or noisy_top_k."
    )
  router = config.router if config.k == k else config.router.replace(k=k)
  rules = [(use, fact(use, "resized")) for use in config.restrict]
  restrict = tuple(
    use if rule is None else rule(use, num_experts, config.k, k) for use, rule in rules
  )
  return dataclasses.replace(
    config, num_experts=num_experts, router=router, restrict=restrict
  )


def check(config: MoEConfig) -> None:
  """Raises unless every expert has its own part of a layer, and no more."""
  if any(fact(use, "resized") is None for use in config.restrict):
    raise ValueError(
      f"restrict={shown(config.restrict)} numbers the experts; leave it out of the "
      "configuration before they change."
    )
  whole = ("glu", "mlp", "clamped_glu")
  if config.experts.name not in whole:
    raise ValueError(
      f"experts={shown(config.experts)}: only {', '.join(whole)} can be taken apart."
    )
  if config.gate.kwargs.get("residual") or config.gate.name in ("none", "slots"):
    raise ValueError(
      f"gate={shown(config.gate)} has no column of its own for each expert."
    )
  rules = config.sharding
  if rules is not None and rules.placement is not None:
    raise ValueError("sharding has a placement of experts; leave it out first.")


def _each(
  layers: Sequence[Layer], config: MoEConfig, change: Callable[..., Any]
) -> Layer:
  """Every array of experts changed: `change(axis of E, array of each layer)`."""

  def walked(trees: Sequence[Any], name: str = "") -> Any:
    if isinstance(trees[0], Mapping):
      return {n: walked([tree[n] for tree in trees], n) for n in trees[0]}
    letters = name.rpartition("_")[2]
    if "E" not in letters:
      return trees[0]
    return change(trees[0].ndim - len(letters) + letters.index("E"), *trees)

  params = {
    part: walked([layer.params[part] for layer in layers])
    if part in OF_EXPERTS
    else layers[0].params[part]
    for part in layers[0].params
  }
  state: dict[str, Any] = {}
  for field in dataclasses.fields(State):
    each = [getattr(layer.state, field.name) for layer in layers]
    if field.name == "gate":
      state["gate"] = walked(each)
    elif all(x is not None for x in each):
      # Biases are an expert's own; what is counted is counted anew.
      moved = change(0, *each) if each[0].ndim else each[0]
      state[field.name] = moved * 0 if _counts(moved) else moved
  return Layer(config, params, State(**state))


def _counts(array: Any) -> bool:
  return np.issubdtype(array.dtype, np.integer)


def concatenated(arrays: Sequence[Any], axis: int) -> Any:
  """One array; of NumPy if they all are, since a model may be larger than a device."""
  on_device = any(isinstance(x, jax.Array) for x in arrays)
  return (jnp if on_device else np).concatenate(arrays, axis)
