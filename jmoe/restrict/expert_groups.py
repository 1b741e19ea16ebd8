"""Best expert groups first: node-limited routing of DeepSeek-V2 and V3."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import jax.numpy as jnp
from jax import Array

from jmoe.kernels.top_k import top_k
from jmoe.types import Context
from jmoe.use import marked


def _check(config, *, num_groups: int, keep: int, best: int = 2) -> None:
  size, rest = divmod(config.num_experts, max(num_groups, 1))
  if num_groups < 1 or rest:
    raise ValueError(
      f"expert_groups: num_groups={num_groups} does not divide "
      f"num_experts={config.num_experts}; use a divisor of it."
    )
  if not 1 <= keep <= num_groups:
    raise ValueError(
      f"expert_groups: keep={keep} of num_groups={num_groups}; use 1 to {num_groups}."
    )
  if not 1 <= best <= size:
    raise ValueError(
      f"expert_groups: best={best}, but a group has {size} experts; use 1 to {size}."
    )
  if config.k is not None and keep * size < config.k:
    raise ValueError(
      f"expert_groups: keep={keep} groups of {size} hold fewer than k={config.k} "
      f"experts; use keep={-(-config.k // size)} or more."
    )


_MOST_LISTED = 1000


def _leaves(
  allowed: frozenset[int],
  num_experts: int,
  *,
  num_groups: int,
  keep: int,
  best: int = 2,
) -> list[frozenset[int]]:
  """Every choice of groups; of very many, only the one with the fewest experts."""
  del best
  size = num_experts // num_groups
  groups = [allowed & set(range(g * size, (g + 1) * size)) for g in range(num_groups)]
  groups = sorted((group for group in groups if group), key=len)
  keep = min(keep, len(groups))
  if math.comb(len(groups), keep) > _MOST_LISTED:
    return [frozenset().union(*groups[:keep])]
  return [frozenset().union(*some) for some in itertools.combinations(groups, keep)]


@marked(check=_check, within=True, leaves=_leaves)
def expert_groups(
  select_TE: Array,
  context: Context,
  *,
  mask: Array | None = None,
  num_groups: int,
  keep: int,
  best: int = 2,
) -> Array:
  """A token may use the experts of its `keep` best expert groups.

  A group is worth the sum of its `best` highest selection scores: 1 gives DeepSeek-V2's
  maximum (arXiv 2405.04434, section 2.2.2), 2 gives V3's rule (arXiv 2412.19437,
  section 2.1.2).  Groups are equal blocks of consecutive experts.  Experts outside the
  other restrictions count nothing, and a group of such experts comes last.

  Args:
    select_TE: f32[T,E] selection scores, bias included.
    context: not read.
    mask: bool[T,E] what the other restrictions allow; None: all.
    num_groups: how many expert groups.
    keep: how many of them a token may use.
    best: how many scores of a group count.

  Returns:
    bool[T,E].
  """
  del context
  T, E = select_TE.shape
  grouped = select_TE.reshape(T, num_groups, E // num_groups)
  if mask is None:
    worth = jnp.sum(_highest(grouped, best), axis=-1)  # [T, groups]
  else:
    grouped = jnp.where(mask.reshape(grouped.shape), grouped, -jnp.inf)
    top = _highest(grouped, best)
    # A group with fewer than `best` of them is worth what it has.
    worth = jnp.sum(jnp.where(top > -jnp.inf, top, 0), axis=-1)
    worth = jnp.where(top[..., 0] > -jnp.inf, worth, -jnp.inf)
  chosen = top_k(worth, keep)  # ties to the lower index
  # [T, keep, groups] compared and reduced in one fusion
  allowed = jnp.any(
    chosen[:, :, None] == jnp.arange(num_groups, dtype=jnp.int32), axis=1
  )
  return jnp.repeat(allowed, E // num_groups, axis=1)


def _highest(values: Array, k: int) -> Array:
  """`[...,K]` the k highest of the last dimension, the highest first."""
  return jnp.take_along_axis(values, top_k(values, k), axis=-1)
