"""Models that share a program, under `vmap`, are more experts of one."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from jmoe.types import Groups


def foldable(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """A kernel for which models that share a program are more experts of one.

  Args:
    kernel: (groups, arrays [R,...] or [E,...] each) -> a tree of such arrays.  Rows are
      in the first array, unless they are read through `token_R`: then it holds tokens.
  """

  @custom_vmap
  def call(groups, token_R, *arrays):
    return kernel(groups, *arrays, **_index(token_R))

  @call.def_vmap
  def _(size, batched, groups, token_R, *arrays):
    def whole(x, is_batched):
      return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    given = (groups, token_R, *arrays)
    groups, token_R, *arrays = jax.tree.map(whole, given, tuple(batched))
    model = jnp.arange(size, dtype=jnp.int32)[:, None]
    rows = arrays[0].shape[1]
    if token_R is not None:
      tokens, rows = rows, token_R.shape[1]
      there = token_R < tokens
      token_R = jnp.where(there, token_R + model * tokens, size * tokens).reshape(-1)
    start = (groups.start + model * rows).reshape(-1)
    folded = Groups(start, groups.rows.reshape(-1), groups.block)
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    out = foldable(kernel)(folded, *flat, token_R=token_R)
    apart = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return apart, jax.tree.map(lambda _: True, out)

  def with_index(groups: Groups, *arrays: Array, token_R: Array | None = None) -> Any:
    return call(groups, token_R, *arrays)

  return with_index


def _index(token_R: Array | None) -> dict[str, Array]:
  return {} if token_R is None else {"token_R": token_R}
