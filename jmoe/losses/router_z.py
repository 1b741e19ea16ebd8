"""The router z-loss: keeps logits small, where float arithmetic is precise."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.losses import _scope
from jmoe.types import Context, Plan, valid_or_all
from jmoe.use import marked


def _check(config, *, over: str = "batch") -> None:
  del config
  _scope.check_scope(over)


@marked(check=_check, any_router=True)
def router_z(
  plan: Plan, context: Context, *, over: str = "batch", axes: _scope.Axes = None
) -> Array:
  """f32[]: mean over valid tokens of logsumexp(logits)^2; (ln E)^2 at zero logits.

  Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, equation 5.  Its gradient is
  2 * logsumexp * softmax / tokens.

  Args:
    plan: of any sparse router.
    context: `valid`; `row` and `num_rows` for `over="sequence"`.
    over: "sequence", "group", "batch" or "mesh": a mean over the tokens of each, then
      over those that hold a valid token.  The first two differ from the third only if
      they hold different numbers of valid tokens.
    axes: mesh axes of `over="mesh"`.
  """
  routing = plan.routing
  valid_T = valid_or_all(context, routing.num_tokens)
  z_T = jax.nn.logsumexp(_scope.masked(routing.logits, valid_T), axis=1)
  sums = _scope.sums(over, routing, context, axes)
  tokens_Z = sums(valid_T.astype(z_T.dtype))
  total_Z = sums(jnp.where(valid_T, jnp.square(z_T), 0))
  return sums.mean(total_Z / jnp.maximum(tokens_Z, 1), tokens_Z)
