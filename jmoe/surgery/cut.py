"""A sparse layer with some of its experts: matrices, gate columns and state cut."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmoe.config import MoEConfig
from jmoe.parallel.rules import letters
from jmoe.surgery.frame import Layer, Model, on_layers
from jmoe.types import State
from jmoe.use import fact, shown

WHOLE = ("shared", "join")  # parts of a layer that are not an expert's


def cut(layer: Layer, experts: Sequence[int]) -> Layer:
  """The layer that has only these experts, in their order in the layer.

  Its outputs are those of the layer under `restrict.subset(experts)` with
  `rescore=True`: scores are taken anew over the experts that are left.  (A bias of
  selection is added to the new scores; there it was added to the old ones.)  It chooses
  as many as before, or all if there are fewer.  All experts: the same layer.

  Args:
    layer: any whose arrays say by name which dimension is the experts' (`up_EDF`).
    experts: which to keep, each once.

  Raises:
    ValueError: no such experts, too few for the router, or a stage that does not say
      what is left of it.
  """
  config, E = layer.config, layer.config.num_experts
  kept = sorted({int(e) for e in experts})
  if not kept or len(kept) != len(experts) or kept[0] < 0 or kept[-1] >= E:
    raise ValueError(
      f"cut: experts={shown(list(experts))} must be distinct and in 0..{E - 1}, 1 or "
      "more of them."
    )
  if len(kept) == E:
    return layer
  state, index = layer.state, np.array(kept)  # no list: jax takes none as an index
  return Layer(
    cut_config(config, kept),
    {
      part: tree if part in WHOLE else taken(tree, index, E, part)
      for part, tree in layer.params.items()
    },
    State(
      bias=None if state.bias is None else state.bias[index],
      gate=taken(state.gate, index, E, "state.gate"),
      # Hashed routing counts through what a token may use.
      table=None if state.table is None else state.table % len(kept),
      counted=None if state.counted is None else 0 * state.counted[index],
      batches=None if state.batches is None else 0 * state.batches,
    ),
  )


def cut_model(model: Model, kept: Sequence[Sequence[int]]) -> Model:
  """The model whose sparse layers have only these experts.

  Args:
    model: any.
    kept: of each sparse layer in order of depth, as for `cut`.

  Raises:
    ValueError: as `cut`.
  """
  return on_layers(model, lambda n, layer: cut(layer, kept[n]))


def of_domain(layer: Layer, number: int) -> list[int]:
  """The experts that serve a domain of a layer under `restrict.domain`.

  Raises:
    ValueError: the layer has no domains, or not this one.
  """
  E = layer.config.num_experts
  for use in layer.config.restrict:
    if use.name == "domain":
      own = fact(use, "leaves")(frozenset(range(E)), E, **use.kwargs)
      if not 0 <= number < len(own):
        raise ValueError(
          f"of_domain: number={number} of {len(own)} domains; give 0 to {len(own) - 1}."
        )
      return sorted(own[number])
  raise ValueError(
    f"of_domain: restrict={layer.config.restrict!r} has no restrict.domain; extract by "
    "calibration text instead."
  )


def cut_config(config: MoEConfig, experts: Sequence[int]) -> MoEConfig:
  """The configuration of a layer that has only these experts; see `cut`."""
  kept = tuple(experts)
  if len(kept) == config.num_experts:
    return config
  changed: dict[str, Any] = {"num_experts": len(kept)}
  if (k := config.router.kwargs.get("k")) is not None:
    changed["router"] = config.router.replace(k=min(k, len(kept)))
  left = []
  for use in config.restrict:
    rule = fact(use, "cut")
    if rule is None:
      raise ValueError(
        f"cut: restrict={use!r} does not say what is left of it among some of the "
        "experts; leave it out of the model first, or mark it with cut=."
      )
    use = rule(use, config.num_experts, kept)
    left += [] if use is None else [use]
  changed["restrict"] = tuple(left)
  if config.sharding is not None and config.sharding.placement is not None:
    changed["sharding"] = dataclasses.replace(config.sharding, placement=None)
  return dataclasses.replace(config, **changed)


def taken(tree: Mapping[str, Any], kept: np.ndarray, E: int, where: str) -> Any:
  """Arrays of a part with these experts, of which one may be there twice."""
  found = {}
  for name, leaf in tree.items():
    if isinstance(leaf, Mapping):
      found[name] = taken(leaf, kept, E, f"{where}.{name}")
      continue
    at = experts_dim(name, leaf, E, where)
    if at is None:
      found[name] = leaf
      continue
    found[name] = leaf[(..., kept, *[slice(None)] * (-at - 1))]
  return found


def experts_dim(name: str, leaf: Any, E: int, where: str) -> int | None:
  """The dimension of an array that is the experts', counted from the end; or None.

  Raises:
    ValueError: an array of experts that has none, or another number of them.
  """
  dims = letters(name)
  if "E" not in dims:
    if where.startswith("experts"):
      raise ValueError(
        f"cut: {where}.{name} is of no single expert; this kind cannot be cut."
      )
    return None
  at = dims.find("E") - len(dims)
  if leaf.shape[at] != E:
    raise ValueError(
      f"cut: {where}.{name} {leaf.shape} is not of num_experts={E}; this kind of "
      "experts cannot be cut."
    )
  return at
