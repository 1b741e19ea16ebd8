"""A token's domain names the experts that serve it (PanGu-Sigma RRE, level one)."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe.types import Context
from jmoe.use import Use, marked, shown


def _check(config, *, num_domains: int, shared: int = 0) -> None:
  owned = config.num_experts - shared
  if num_domains < 1 or shared < 0 or owned < num_domains or owned % num_domains:
    raise ValueError(
      f"domain: num_experts={config.num_experts} less shared={shared} is not a "
      f"multiple of num_domains={num_domains}; make it one."
    )
  if config.k is not None and owned // num_domains + shared < config.k:
    raise ValueError(
      f"domain: {owned // num_domains} + {shared} shared experts a domain are fewer "
      f"than k={config.k}; use more experts or a smaller k."
    )


def _leaves(
  allowed: frozenset[int], num_experts: int, *, num_domains: int, shared: int = 0
) -> list[frozenset[int]]:
  """The experts of each domain."""
  size = (num_experts - shared) // num_domains
  common = set(range(num_experts - shared, num_experts))
  return [
    allowed & {*range(d * size, (d + 1) * size), *common} for d in range(num_domains)
  ]


def _cut(use: Use, num_experts: int, kept: tuple[int, ...]) -> None:
  """Nothing, if these are the experts of one domain; else there is no such model."""
  own = _leaves(frozenset(range(num_experts)), num_experts, **use.kwargs)
  if frozenset(kept) not in own:
    raise ValueError(
      f"cut: experts={shown(kept)} are not those of one domain of {use!r}; keep a "
      "domain's, as surgery.of_domain lists them."
    )


@marked(check=_check, needs=("domain_id",), leaves=_leaves, cut=_cut)
def domain(
  select_TE: Array, context: Context, *, num_domains: int, shared: int = 0
) -> Array:
  """Domain d may use the d-th block of experts, and the last `shared` ones.

  PanGu-Sigma (arXiv 2303.10845), random routed experts, level one.

  Args:
    select_TE: f32[T,E]; only its shape is read.
    context: `domain_id` i32[T] in `[0, num_domains)`; outside it only the shared
      experts are allowed.
    num_domains: how many domains.
    shared: how many experts, at the end, serve every domain.

  Returns:
    bool[T,E].
  """
  assert context.domain_id is not None
  E = select_TE.shape[1]
  owner_E = jnp.arange(E, dtype=jnp.int32) // ((E - shared) // num_domains)
  common_E = jnp.arange(E, dtype=jnp.int32) >= E - shared
  return (context.domain_id[:, None] == owner_E) & ~common_E | common_E
