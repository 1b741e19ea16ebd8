"""Models cut out of one model, as one model with the experts of all of them."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmoe.config import ModelConfig, MoEConfig
from jmoe.surgery.cut import WHOLE, cut_config, experts_dim
from jmoe.surgery.extract import Extracted
from jmoe.surgery.frame import Block, Layer, Model, blocks, rebuilt
from jmoe.types import State

Kept = Sequence[Sequence[int]]  # of each sparse layer in order of depth


def compose(whole: ModelConfig, parts: Sequence[tuple[Model, Kept]]) -> Extracted:
  """The model that has every expert which some part has.

  Of parts that together hold all experts it is the model that they were cut from, bit
  by bit.

  Args:
    whole: configuration of that model.
    parts: each with the experts that were kept, numbered as in the whole model.

  Returns:
    The model and which experts it has; no scores.

  Raises:
    ValueError: no parts; they differ in what they share, as after training: nothing
      says which of them is right; or routing by a table, which a cut does not keep.
  """
  if not parts:
    raise ValueError("compose: parts=[]; give one or more.")
  first = parts[0][0]
  for n, (part, _) in enumerate(parts[1:], 1):
    _same(_outside(first.params), _outside(part.params), f"part {n}")
  own = [blocks(part) for part, _ in parts]
  wanted = [c for kinds, repeat in whole.segments for _ in range(repeat) for c in kinds]
  if any(len(each) != len(wanted) for each in own):
    depths = [len(each) for each in own]
    raise ValueError(
      f"compose: parts of {depths} blocks, but the whole model has {len(wanted)}; give "
      "the configuration that they were cut from."
    )
  made, kept, number = [], [], 0
  for depth, config in enumerate(wanted):
    each, where = [some[depth] for some in own], f"block {depth} of part"
    for n, block in enumerate(each[1:], 1):
      _same(_rest(each[0]), _rest(block), f"{where} {n}")
    block = each[0]
    if isinstance(config.ff, MoEConfig):
      held = [list(of[number]) for _, of in parts]
      layer, union = _joined(config.ff, [b.layer for b in each], held, where)
      block, number = block.with_layer(layer), number + 1
      kept.append(union)
    made.append(block)
  return Extracted(rebuilt(Model(whole, first.params), made), kept, [])


def _joined(
  config: MoEConfig, layers: Sequence[Layer], held: Sequence[list[int]], where: str
) -> tuple[Layer, list[int]]:
  """A layer with the experts of all, and their numbers in the whole one."""
  if any(layer.state.table is not None for layer in layers):
    raise ValueError(
      f"compose: router={config.router!r} reads a table, which a cut does not keep; "
      "extract from the whole model again."
    )
  union = sorted(set().union(*held))

  def join(trees: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    found = {}
    for name, leaf in trees[0].items():
      each = [tree[name] for tree in trees]
      if isinstance(leaf, Mapping):
        found[name] = join(each, f"{part}.{name}")
        continue
      at = experts_dim(name, leaf, len(held[0]), part)
      if at is None:
        for n, other in enumerate(each[1:], 1):
          _same({name: leaf}, {name: other}, f"{where} {n}", f"{part}.")
        found[name] = leaf
      else:
        found[name] = _picked(each, held, union, at, f"{part}.{name}", where)
    return found

  params = {
    part: tree if part in WHOLE else join([x.params[part] for x in layers], part)
    for part, tree in layers[0].params.items()
  }
  gate = join([layer.state.gate for layer in layers], "state.gate")
  biases = [layer.state.bias for layer in layers]
  bias = None
  if biases[0] is not None:
    bias = _picked(biases, held, union, -1, "state.bias", where)
  state = State(bias=bias, gate=gate)
  if layers[0].state.counted is not None:  # an update begins
    zero_E = np.zeros(len(union), np.int32)
    state = dataclasses.replace(state, counted=zero_E, batches=zero_E[0])
  return Layer(cut_config(config, union), params, state), union


def _picked(
  each: Sequence[Any],
  held: Sequence[list[int]],
  union: list[int],
  at: int,
  name: str,
  where: str,
) -> Any:
  """Arrays joined along their experts' dimension; those of two parts must be equal."""
  slices: dict[int, Any] = {}
  for n, (leaf, numbers) in enumerate(zip(each, held, strict=True)):
    moved = np.moveaxis(np.asarray(leaf), at, 0)
    for place, expert in enumerate(numbers):
      known = slices.setdefault(expert, moved[place])
      if not np.array_equal(known, moved[place]):
        raise ValueError(
          f"compose: {where} {n} has another {name} of expert {expert} than a part "
          "before it; compose parts as they were extracted, or merge them."
        )
  return np.moveaxis(np.stack([slices[expert] for expert in union]), 0, at)


def _rest(block: Block) -> dict[str, Any]:
  """What is no expert's: attention, norms, dense and shared feed-forwards."""
  own = tuple(f"moe.{part}." for part in WHOLE)
  return {
    name: x
    for name, x in block.params.items()
    if not name.startswith("moe.") or name.startswith(own)
  }


def _outside(params: Mapping[str, Any]) -> dict[str, Any]:
  return {n: x for n, x in params.items() if not n.startswith("segments.")}


def _same(
  one: Mapping[str, Any], other: Mapping[str, Any], where: str, at: str = ""
) -> None:
  for name in sorted(set(one) | set(other)):
    if name in one and name in other:
      if np.array_equal(np.asarray(one[name]), np.asarray(other[name])):
        continue
    raise ValueError(
      f"compose: {where} differs from the first in {at}{name}; compose parts as they "
      "were extracted, or merge them."
    )
