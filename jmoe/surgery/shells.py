"""Layers of models that are no `Decoder`: of Flax Linen, or of Flax NNX."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jmoe import nnx as shell
from jmoe.config import MoEConfig
from jmoe.surgery.frame import Layer
from jmoe.types import State

Path = tuple[Any, ...]  # names of modules, from the model down
_STATE = "moe_state"


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
    layer = change(path, of_linen(config, {n: x for n, x in own.items() if x}))
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
      _filled(module, change(tuple(path), of_nnx(module)))
  return made


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
