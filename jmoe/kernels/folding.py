"""Models that share a program, under `vmap`, are more experts of one."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jmoe.types import Groups


def foldable(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """A kernel for which models that share a program are more experts of one.

  Args:
    kernel: (groups, arrays [R,...] or [E,...] each) -> a tree of such arrays; or a
      tuple of groups, of buffers the first arrays of which come first, in their order.
  """

  @custom_vmap
  def call(groups, *arrays):
    return kernel(groups, *arrays)

  @call.def_vmap
  def _(size, batched, groups, *arrays):
    def whole(x, is_batched):
      return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    groups, *arrays = jax.tree.map(whole, (groups, *arrays), tuple(batched))
    model = jnp.arange(size, dtype=jnp.int32)[:, None]

    def more(groups, rows):
      start = groups.start + model * rows.shape[1]
      return Groups(start.reshape(-1), groups.rows.reshape(-1), groups.block)

    if isinstance(groups, tuple):
      folded = tuple(map(more, groups, arrays))
    else:  # rows are in the first array of every kernel
      folded = more(groups, arrays[0])
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    out = foldable(kernel)(folded, *flat)
    apart = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return apart, jax.tree.map(lambda _: True, out)

  return call
