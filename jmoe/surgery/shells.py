"""Layers of models that are no `Decoder`: of Flax Linen, or of Flax NNX."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jmoe import nnx as shell
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.surgery.frame import Block, Layer, Model, _flat, _nested, rebuilt
from jmoe.surgery.layout import laid_out
from jmoe.types import State

Path = tuple[Any, ...]  # names of modules, from the model down
_STATE = "moe_state"


def alone(layer: Layer) -> Model:
  """A model of this layer and nothing else, for operations on whole models.

  For those that run none: `surgery.layers(grow.grow(alone(layer), 2))[0]` is the layer
  with two more experts, and alike for `upcycle.expand`, `merge.concatenate`,
  `merge.average`, `prune.choose` with `cut_model`.  Scores of one's own model come of
  `surgery.mean_probability` and the like, given what `with_plan=True` reports.

  Args:
    layer: any.
  """
  attention = Attention(num_heads=1, head_dim=2, causal=False)  # it has no arrays
  block = Block(BlockConfig(attention, Dense(1)), {}, {}).with_layer(layer)
  segments = (((block.config,), 1),)
  whole = ModelConfig(2, layer.config.d_model, segments, remat=False)
  return rebuilt(Model(whole, {}), [block])


def of_linen(config: MoEConfig, variables: Mapping[str, Any]) -> Layer:
  """A `linen.MoE` as what operations take.

  Args:
    config: of the module.
    variables: as its `init` gave them, without boxes (`flax.linen.unbox`).
  """
  state = variables.get(_STATE, {}).get("state", State())
  if isinstance(state, Mapping):  # as a checkpoint that knows no types gives it
    state = State(**state)
  return Layer(config, variables["params"], state)


def to_linen(layer: Layer) -> dict[str, Any]:
  """The variables of `linen.MoE(layer.config)`."""
  found: dict[str, Any] = {"params": dict(layer.params)}
  if jax.tree.leaves(layer.state):
    found[_STATE] = {"state": layer.state}
  return found


def on_linen(
  variables: Mapping[str, Any],
  configs: Mapping[Path, MoEConfig],
  change: Callable[[Path, Layer], Layer],
) -> tuple[dict[str, Any], dict[Path, MoEConfig]]:
  """The variables of a Linen model with its sparse layers changed.

  Args:
    variables: of the model, without boxes.  Moments of an optimizer change alike as
      {"params": moments}.
    configs: of each layer, by the names of modules from the model down to it, as
      ("block_0", "MoE_0"); for the model that is one layer, ().
    change: takes the place of a layer, and the layer.

  Returns:
    Variables, and the configurations with which modules must now be built.

  Raises:
    KeyError: no layer at a place.
  """
  made = {name: dict(tree) for name, tree in variables.items()}
  found = {}
  for path, config in configs.items():
    own = {name: _at(tree, path) for name, tree in variables.items()}
    if own.get("params") is None:
      raise KeyError(
        f"configs: {path} is no layer of the variables; give the names of modules from "
        "the model down to it."
      )
    before = of_linen(config, {n: x for n, x in own.items() if x})
    layer = _laid_out(change(path, before), before)
    found[path] = layer.config
    for name, tree in to_linen(layer).items():
      if name in made:
        made[name] = _with(made[name], path, tree)
  return made, found


def of_nnx(module: shell.MoE) -> Layer:
  """An `nnx.MoE` as what operations take."""
  return Layer(module.config, module.params(), module.get_state())


def to_nnx(layer: Layer) -> shell.MoE:
  """An `nnx.MoE` that holds these arrays; nothing is drawn."""
  made = nnx.eval_shape(lambda: shell.MoE(layer.config, rngs=nnx.Rngs(0)))
  return _filled(made, layer)


def on_nnx(model: Any, change: Callable[[Path, Layer], Layer]) -> Any:
  """A copy of an NNX model with its sparse layers changed.

  Args:
    model: with `nnx.MoE`s anywhere in it; it stays as it is.
    change: takes the place of a layer in the model, and the layer.
  """
  made = nnx.clone(model)
  for path, module in list(nnx.iter_graph(made)):
    if isinstance(module, shell.MoE):
      before = of_nnx(module)
      _filled(module, _laid_out(change(tuple(path), before), before))
  return made


def _laid_out(layer: Layer, before: Layer) -> Layer:
  """Parameters over the mesh of those that they come from."""
  flat = laid_out(_flat(layer.params), _flat(before.params))
  return layer._replace(params=_nested(flat))


def _filled(module: shell.MoE, layer: Layer) -> shell.MoE:
  module.config = layer.config
  for name, tree in layer.params.items():
    setattr(module, name, shell._Tree(tree, nnx.Param))
  for name in set(module.params()) - set(layer.params):
    delattr(module, name)
  fields = {f.name: getattr(layer.state, f.name) for f in dataclasses.fields(State)}
  state = {n: x for n, x in fields.items() if x is not None and jax.tree.leaves(x)}
  module.state = shell._Tree(state, shell.LayerState)
  return module


def _at(tree: Any, path: Sequence[str | int]) -> Any:
  for name in path:
    if not isinstance(tree, Mapping) or name not in tree:
      return None
    tree = tree[name]
  return tree


def _with(tree: Mapping[str, Any], path: Sequence[Any], leaf: Any) -> dict[str, Any]:
  """A copy of a nested dict with another part."""
  if not path:
    return dict(leaf)
  first, *rest = path
  return {**tree, first: _with(tree[first], rest, leaf)}
