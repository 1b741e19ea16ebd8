"""Only these experts: extraction and pruning, before anything is cut."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.types import Context
from jmoe.use import Use, marked


def _check(config, *, experts: tuple[int, ...]) -> None:
  outside = [e for e in experts if not 0 <= e < config.num_experts]
  if outside or len(set(experts)) != len(experts):
    raise ValueError(
      f"subset: experts={experts} must be distinct and in 0..{config.num_experts - 1}."
    )
  if not experts:
    raise ValueError("subset: experts=() leaves none to use; keep 1 or more.")
  if config.k is not None and len(experts) < config.k:
    raise ValueError(
      f"subset: {len(experts)} experts are fewer than k={config.k}; "
      f"keep {config.k} or more."
    )


def _leaves(
  allowed: frozenset[int], num_experts: int, *, experts: tuple[int, ...]
) -> list[frozenset[int]]:
  del num_experts
  return [allowed & set(experts)]


def _cut(use: Use, num_experts: int, kept: tuple[int, ...]) -> Use | None:
  """Those of the listed experts that are left, by their new numbers."""
  del num_experts
  listed = set(use.get("experts"))
  left = tuple(n for n, e in enumerate(kept) if e in listed)
  return None if len(left) == len(kept) else use.replace(experts=left)


@marked(check=_check, leaves=_leaves, cut=_cut)
def subset(select_TE: Array, context: Context, *, experts: tuple[int, ...]) -> Array:
  """Every token may use the listed experts and no others.

  With `MoEConfig(rescore=True)` it equals the layer with the other experts' weights and
  gate columns cut away.

  Args:
    select_TE: f32[T,E]; only its shape is read.
    context: not read.
    experts: indices to keep.

  Returns:
    bool[T,E].
  """
  del context
  keep_E = np.zeros(select_TE.shape[1], bool)
  keep_E[list(experts)] = True
  return jnp.broadcast_to(jnp.asarray(keep_E), select_TE.shape)
