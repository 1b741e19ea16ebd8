"""The importance loss of V-MoE: keeps the summed scores of the experts alike."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array

from jmoe.losses import _scope
from jmoe.types import Context, Plan, valid_or_all
from jmoe.use import marked


def _check(config, *, over: str = "group") -> None:
  del config
  _scope.check_scope(over)


@marked(check=_check, any_router=True)
def importance(
  plan: Plan, context: Context, *, over: str = "group", axes: _scope.Axes = None
) -> Array:
  """f32[]: squared coefficient of variation of experts' summed scores; 0 at balance.

  The scores are the softmax of the logits before noise.  One expert taking all gives
  E - 1.

  Source: Riquelme et al. 2021 (V-MoE), arXiv 2106.05974, appendix A.2; the deviation is
  the population's and the mean is over routing groups, as in the authors' code.

  Args:
    plan: of any sparse router.
    context: `valid`; `row` and `num_rows` for `over="sequence"`.
    over: "sequence", "group", "batch" or "mesh": tokens whose scores are summed.  The
      mean is taken over scopes that hold a valid token.
    axes: mesh axes of `over="mesh"`.
  """
  routing = plan.routing
  valid_T = valid_or_all(context, routing.num_tokens)
  clean_TE = jax.nn.softmax(_scope.masked(routing.logits, valid_T))
  clean_TE = _scope.masked(clean_TE, valid_T)
  sums = _scope.sums(over, routing, context, axes)
  variation_Z = _scope.squared_variation(sums(clean_TE))
  return sums.mean(variation_Z, sums(valid_T.astype(clean_TE.dtype)))
