"""Which part of each parameter a device holds, by the table that layers run with."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import PartitionSpec

from jmoe.parallel import EXPERT_TENSOR, param_specs

RULES = EXPERT_TENSOR  # any axis of a mesh may be left out


def spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
  """The mesh axes of a parameter's dims, without axes of size one.

  Args:
    name: dotted, of `state.blueprint`.
    shape: of the whole array, stacks included.
    sizes: of the mesh axes.
  """
  leaf = jax.ShapeDtypeStruct(shape, "float32")
  tree = traverse_util.unflatten_dict({name: leaf}, sep=".")
  (found,) = jax.tree.leaves(
    param_specs(tree, RULES, sizes), is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
  return found


def axes(spec: PartitionSpec) -> list[str]:
  """The mesh axes that split an array."""
  return [a for dim in spec for a in ((dim,) if isinstance(dim, str) else dim or ())]


def share(spec: PartitionSpec, sizes: Mapping[str, int]) -> float:
  """Part of an array that a device holds."""
  return 1.0 / math.prod(sizes.get(axis, 1) for axis in axes(spec))


def like(name: str, shape: tuple[int, ...], params: Mapping[str, Any]) -> str | None:
  """The parameter that an array of the optimizer's state goes with, if it is as large.

  Args:
    name: path of the array in the state.
    shape: of the array.
    params: of the model, by name.
  """
  for param in sorted(params, key=len, reverse=True):
    if param in name and params[param].shape == shape:
      return param
  return None
