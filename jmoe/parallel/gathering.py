"""From a device's share of the parameters to what its tokens need.

The reverse is automatic differentiation's: a gather's gradient is summed and split
again, and that of a matrix which all devices have alike is summed over them.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jmoe.kernels.varying import over
from jmoe.parallel import rules as tables
from jmoe.parallel.rules import letters


def whole(params: Any, specs: Any, config: Any, split: Any) -> Any:
  """The parameters that one shard computes with, of its share by their specs.

  Experts stay split where the dispatch exchanges rows, and hidden layers where tensor
  axes split them; all else is gathered.  Biases after a split hidden layer are kept by
  the first device alone, since its outputs are summed.
  """
  from jmoe.parallel.spmd import exchanges

  def one(path: Any, leaf: Array, at_leaf: PartitionSpec) -> Array:
    names = [str(getattr(step, "key", step)) for step in path]
    part, name = names[0], names[-1]
    copies = split.rules.placement is not None and split.axes("expert")
    if part == "experts" and copies:  # of one device's experts there is no second copy
      return _dealt(over(leaf, split.token_axes), name, split)
    # Differing before it is gathered: its gradient is split first and summed then.
    leaf = over(leaf, split.token_axes)
    for at, axes in enumerate(at_leaf, -len(at_leaf)):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      letter = letters(name)[at] if axes else ""
      if letter == "E" and exchanges(config):
        axes = tuple(a for a in axes if a not in split.axes("expert"))
      axes = tuple(a for a in axes if letter != "F" or a not in split.features)
      if axes:
        leaf = lax.all_gather(leaf, axes, axis=leaf.ndim + at, tiled=True)
    return _once(leaf, name, split) if part in ("experts", "shared") else leaf

  return jax.tree_util.tree_map_with_path(one, params, specs)


def _once(leaf: Array, name: str, split: Any) -> Array:
  """A bias after a split hidden layer, on the first device alone."""
  if not split.features or "F" in letters(name):
    return leaf
  first = lax.axis_index(split.features) == 0
  return jnp.where(first, leaf, jnp.zeros_like(leaf))


def _dealt(leaf: Array, name: str, split: Any) -> Array:
  """This device's slots, from slices of d_model of all experts.

  An all-to-all deals them out: what a device receives is as much as its slots are, and
  on the way back the gradients of an expert's copies are added up.
  """
  axes, placement = split.axes("expert"), jnp.asarray(split.rules.placement, jnp.int32)
  dims = tables.split_dims("experts", name, leaf.shape, split.rules, split.sizes)
  at = next((d for d in dims if letters(name)[d] == "D"), None)
  if at is None:  # a bias, which all devices have whole
    local = placement.shape[0] // tables.product(axes, split.sizes)
    first = lax.axis_index(axes) * local
    leaf = leaf[lax.dynamic_slice_in_dim(placement, first, local)]
    return _once(leaf, name, split)
  leaf = lax.all_to_all(leaf[placement], axes, 0, leaf.ndim + at, tiled=True)
  for d, split_by in dims.items():
    if others := tuple(a for a in split_by if a not in (*axes, *split.features)):
      leaf = lax.all_gather(leaf, others, axis=leaf.ndim + d, tiled=True)
  return leaf
