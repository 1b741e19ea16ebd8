"""From a device's share of the parameters to what its tokens need.

The reverse is automatic differentiation's: a gather's gradient is summed and split
again, and that of a matrix which all devices have alike is summed over them.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.varying import over
from jmoe.parallel import rules as tables
from jmoe.parallel.rules import letters


def whole(params: Any, config: Any, split: Any) -> Any:
  """The parameters that one shard computes with.

  Experts stay split where the dispatch exchanges rows, and hidden layers where tensor
  axes split them; all else is gathered.  Biases after a split hidden layer are kept by
  the first device alone, since its outputs are summed.
  """
  from jmoe.parallel.spmd import exchanges

  def one(path: Any, leaf: Array) -> Array:
    names = [str(getattr(step, "key", step)) for step in path]
    part, name = names[0], names[-1]
    # Differing before it is gathered: its gradient is split first and summed then.
    leaf = over(leaf, split.token_axes)
    for at, axes in tables.split_dims(part, name, split.rules, split.sizes).items():
      letter = letters(name)[at]
      if letter == "E" and exchanges(config):
        continue
      axes = tuple(a for a in axes if letter != "F" or a not in split.features)
      if axes:
        leaf = lax.all_gather(leaf, axes, axis=leaf.ndim + at, tiled=True)
    if part in ("experts", "shared") and split.features and "F" not in letters(name):
      first = lax.axis_index(split.features) == 0
      leaf = jnp.where(first, leaf, jnp.zeros_like(leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(one, params)
