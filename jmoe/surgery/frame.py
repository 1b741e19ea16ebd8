"""What every operation takes and gives: a model as configuration and named arrays.

A `Model` is taken apart into its blocks in order of depth; an operation changes the
sparse layers of some; `rebuilt` puts them together again.  The arrays of a model that
was given are never written to.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.models.by_name import Arrays, Blueprint, take_apart
from jmoe.models.decoder import Decoder
from jmoe.surgery.layout import laid_out
from jmoe.types import Params, State

_MOE = "moe."


class Model(NamedTuple):
  """A `Decoder` as data; arrays of NumPy or of jax, sharded or not."""

  config: ModelConfig
  params: Mapping[str, Any]  # by dotted name, see `jmoe.models.by_name`
  state: Mapping[str, Any] = {}  # balance biases, buffers and tables, by name too

  def module(self) -> Decoder:
    """The module that computes with these arrays."""
    return blueprint(self.config).model(dict(self.params), dict(self.state))


class Layer(NamedTuple):
  """A sparse layer as `jmoe.moe` takes it; both Flax shells hold the same tree."""

  config: MoEConfig
  params: Params
  state: State = State()


class Block(NamedTuple):
  """One block of a model; names are those below it: "moe.gate.kernel_DE"."""

  config: BlockConfig
  params: Mapping[str, Any]
  state: Mapping[str, Any]

  @property
  def sparse(self) -> bool:
    return isinstance(self.config.ff, MoEConfig)

  @property
  def layer(self) -> Layer:
    """Its sparse layer.

    Raises:
      TypeError: its feed-forward is dense.
    """
    ff = self.config.ff
    if not isinstance(ff, MoEConfig):
      raise TypeError(f"layer: ff={ff!r} is dense; ask `sparse` first.")
    state = _nested(_below(self.state, _MOE)).get("state", {})
    return Layer(ff, _nested(_below(self.params, _MOE)), State(**state))

  def with_layer(self, layer: Layer) -> "Block":
    """The block with another sparse layer in place of its feed-forward."""
    rest = {n: x for n, x in self.params.items() if n.partition(".")[0] not in _FEEDS}
    fields = {
      f.name: getattr(layer.state, f.name) for f in dataclasses.fields(layer.state)
    }
    state = {n: x for n, x in fields.items() if x is not None and jax.tree.leaves(x)}
    return Block(
      dataclasses.replace(self.config, ff=layer.config),
      rest | {_MOE + name: x for name, x in _flat(layer.params).items()},
      {f"{_MOE}state.{name}": x for name, x in _flat(state).items()},
    )


_FEEDS = ("moe", "ff")


def model_of(module: Decoder) -> Model:
  """A module as data."""
  _, params, state = take_apart(module)
  return Model(module.config, params, state)


@functools.lru_cache(maxsize=64)
def blueprint(config: ModelConfig) -> Blueprint:
  """The structure of a model; nothing is computed."""
  return take_apart(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def blocks(model: Model) -> list[Block]:
  """The blocks of a model in order of depth, each with arrays of its own."""
  found = []
  for s, (configs, repeat) in enumerate(model.config.segments):
    stacks = [
      [_below(arrays, f"segments.{s}.{b}.") for arrays in (model.params, model.state)]
      for b in range(len(configs))
    ]
    for r in range(repeat):
      for config, (params, state) in zip(configs, stacks, strict=True):
        one = [{n: x[r] for n, x in arrays.items()} for arrays in (params, state)]
        found.append(Block(config, *one))
  return found


def rebuilt(model: Model, changed: Sequence[Block]) -> Model:
  """The model with other blocks, as many as it had.

  Repeats of a segment whose blocks are still alike stay one stack; a segment whose
  repeats have come to differ, as by unequal numbers of experts, becomes several.
  Arrays lie over a mesh as those of the model do (`jmoe.surgery.layout`).

  Args:
    model: where embedding, norm and logits are taken from.
    changed: its blocks in order of depth.
  """
  segments, params, state = [], _outside(model.params), _outside(model.state)
  left = iter(changed)
  for configs, repeat in model.config.segments:
    turns = [list(itertools.islice(left, len(configs))) for _ in range(repeat)]
    alike = itertools.groupby(turns, lambda turn: tuple(b.config for b in turn))
    for kinds, group in alike:
      stacked = list(zip(*group, strict=True))  # the repeats of each block
      at = len(segments)
      segments.append((kinds, len(stacked[0])))
      for b, repeats in enumerate(stacked):
        for arrays, field in ((params, "params"), (state, "state")):
          each = [getattr(block, field) for block in repeats]
          for name in each[0]:
            stack = _stack([one[name] for one in each])
            arrays[f"segments.{at}.{b}.{name}"] = stack
  config = dataclasses.replace(model.config, segments=tuple(segments))
  params, state = laid_out(params, model.params), laid_out(state, model.state)
  return Model(config, params, state)


def on_layers(model: Model, change: Callable[[int, Layer], Layer]) -> Model:
  """The model with each sparse layer changed.

  Args:
    model: any.
    change: takes the number of a sparse layer, counted from zero in order of depth, and
      the layer.
  """
  number, made = itertools.count(), []
  for block in blocks(model):
    if block.sparse:
      block = block.with_layer(change(next(number), block.layer))
    made.append(block)
  return rebuilt(model, made)


def layers(model: Model) -> list[Layer]:
  """The sparse layers of a model in order of depth."""
  return [block.layer for block in blocks(model) if block.sparse]


def layer_configs(config: ModelConfig) -> list[MoEConfig]:
  """The sparse layers of a model in order of depth, without their arrays."""
  kinds = [kinds for kinds, repeat in config.segments for _ in range(repeat)]
  found = [block.ff for block in itertools.chain(*kinds)]
  return [ff for ff in found if isinstance(ff, MoEConfig)]


def _outside(arrays: Mapping[str, Any]) -> Arrays:
  return {n: x for n, x in arrays.items() if not n.startswith("segments.")}


def _below(arrays: Mapping[str, Any], prefix: str) -> Arrays:
  return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *path, last = name.split(".")
    at = tree
    for part in path:
      at = at.setdefault(part, {})
    at[last] = leaf
  return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Arrays:
  found: Arrays = {}
  for name, leaf in tree.items():
    if isinstance(leaf, Mapping):
      found |= _flat(leaf, f"{prefix}{name}.")
    else:
      found[prefix + name] = leaf
  return found


def _stack(arrays: Sequence[Any]) -> Any:
  # Those of NumPy stay there: a checkpoint may be larger than an accelerator.
  on_device = any(isinstance(x, jax.Array) for x in arrays)
  return jnp.stack(arrays) if on_device else np.stack(arrays)
