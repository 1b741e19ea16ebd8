"""All that training carries from step to step, as one tree of arrays.

A model is taken apart into arrays by dotted name ("segments.0.0.moe.gate.kernel") and
a `Blueprint` that puts it together again inside a traced function.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from jmoe.config import ModelConfig
from jmoe.models import Decoder
from jmoe.types import pytree

Arrays = dict[str, Array]


@pytree
class TrainState:
  """A run between two steps."""

  step: Array  # i32[]  steps done
  key: Array  # u32[2]  data of the run's random key; steps fold their number
  params: Arrays
  balance: Arrays  # what is not learned by gradient, e.g. routing biases
  optimizer: Any


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


def take_apart(model: nnx.Module) -> tuple[Blueprint, Arrays, Arrays]:
  """(blueprint, parameters, everything else) of a model."""
  graph, *states = nnx.split(model, nnx.Param, ...)
  trees = [jax.tree.structure(state) for state in states]
  params, balance = (
    dict(zip(_names(tree), jax.tree.leaves(state), strict=True))
    for tree, state in zip(trees, states, strict=True)
  )
  return Blueprint(graph, *trees), params, balance


def blueprint(config: ModelConfig) -> tuple[Blueprint, list[str]]:
  """The structure of a model and the names of its parameters; nothing is computed."""
  made, params, _ = take_apart(nnx.eval_shape(functools.partial(_model, config)))
  return made, list(params)


@functools.partial(jax.jit, static_argnames=("config", "optimizer"))
def init_state(
  key: Array, *, config: ModelConfig, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state before the first step, from the data (u32[2]) of a random key."""
  _, params, balance = take_apart(_model(config, jax.random.wrap_key_data(key)))
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, key, params, balance, optimizer.init(params))


def _model(config: ModelConfig, key: Array | None = None) -> Decoder:
  return Decoder(config, rngs=nnx.Rngs(jax.random.key(0) if key is None else key))


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
