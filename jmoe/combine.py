"""The two linear ways home: `(plan) -> Home`."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp

from jmoe.types import Home, Plan
from jmoe.use import marked


def weighted_sum(plan: Plan) -> Home:
  """`y_t = sum_j w_tj E_tj(x_t)` over kept assignments.

  Returns:
    Home whose strategies give `[T,D]`.
  """
  return Home(jnp.where(plan.kept, plan.routing.weight, 0))


def _check_stack(config) -> None:
  if config.k is None:
    raise ValueError(
      f"combine=stack: {config.router.name} has no fixed number of choices per token; "
      "use a token-choice router."
    )


@marked(check=_check_stack, stacks=True)
def stack(plan: Plan) -> Home:
  """Every chosen expert's output by itself, unweighted; dropped ones are zero.

  Returns:
    Home whose strategies give `[T,K,D]`, for an aggregation.
  """
  kept = plan.kept.astype(plan.routing.weight.dtype)
  return Home(kept, sums=False)
