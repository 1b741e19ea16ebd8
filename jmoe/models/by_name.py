"""A model as arrays by dotted name, and the structure that makes it whole again.

Names are those of checkpoints: "segments.0.1.moe.gate.kernel_DE" is the gate of block 1
of segment 0, of all repeats of the segment, `[repeat,D,E]`.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from jmoe.models.decoder import Decoder
from jmoe.types import Info

Arrays = dict[str, Array]


class Blueprint(NamedTuple):
  """The structure of a model, without its arrays."""

  graph: Any
  params: Any  # treedef
  balance: Any  # treedef

  def model(self, params: Arrays, balance: Arrays) -> Decoder:
    """The module that holds these arrays."""
    # Names were given in the order of the leaves, and dictionaries keep it only until
    # jax sorts them: look each up.
    states = [
      jax.tree.unflatten(tree, [arrays[name] for name in _names(tree)])
      for tree, arrays in ((self.params, params), (self.balance, balance))
    ]
    return nnx.merge(self.graph, *states)

  def balanced(self, params: Arrays, balance: Arrays, infos: Sequence[Info]) -> Arrays:
    """What is not learned by gradient, after the step that gave these infos.

    Args:
      params: after that step.
      balance: before it.
      infos: of the call in training.
    """
    model = self.model(params, balance)
    model.update(infos)
    return take_apart(model)[2]


def take_apart(model: nnx.Module) -> tuple[Blueprint, Arrays, Arrays]:
  """(blueprint, parameters, everything else) of a model."""
  graph, *states = nnx.split(model, nnx.Param, ...)
  trees = [jax.tree.structure(state) for state in states]
  params, balance = (
    dict(zip(_names(tree), jax.tree.leaves(state), strict=True))
    for tree, state in zip(trees, states, strict=True)
  )
  return Blueprint(graph, *trees), params, balance


def _names(tree: Any) -> list[str]:
  """Dotted names of a tree's leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(
    jax.tree.unflatten(tree, [0] * tree.num_leaves)
  )
  # The last step of a path is flax's wrapper around the array.
  return [".".join(map(path_part, path[:-1])) for path, _ in leaves]


def path_part(entry: Any) -> str:
  """The text of one step of a path, whichever of jax's kinds it is."""
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)
