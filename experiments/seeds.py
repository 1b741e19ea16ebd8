"""Several seeds of one run in one program: states and batches with a leading dim.

On a GPU that is no Hopper give the sparse layers `dispatch.buckets`, which stay batched
products; ragged groups of several models at once are served by no fast matmul there.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")


@jax.jit
def stack(trees: Sequence[_T]) -> _T:
  """One tree whose arrays have a leading [seeds], from one tree a seed."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def unstack(tree: _T) -> list[_T]:
  """A tree for each seed, from one whose arrays have a leading [seeds]."""
  leaves = jax.tree.leaves(tree)
  return [jax.tree.map(lambda x, n=n: x[n], tree) for n in range(leaves[0].shape[0])]


def jitted(step: Callable[..., Any]) -> Callable[..., Any]:
  """`step(state, batch)` of all seeds at once, jitted; the states are donated.

  Args:
    step: `train_step` with its keywords bound.
  """
  return jax.jit(jax.vmap(step), donate_argnums=0)
