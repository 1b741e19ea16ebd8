"""The load-balance loss: keeps the shares of the experts alike.

A pure function of a plan, like every loss; the layer returns it by name, unweighted.
"""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe._value_checks import whole
from jmoe.losses import _scope
from jmoe.types import Context, Plan, valid_or_all
from jmoe.use import marked, shown


def _check(
  config, *, over: str = "batch", choices: str = "all", accumulate: int = 1
) -> None:
  del config
  _scope.check_scope(over)
  if choices not in ("all", "first"):
    raise ValueError(f"load_balance: choices={choices!r}; give 'all' or 'first'.")
  if not whole(accumulate):
    raise ValueError(
      f"load_balance: accumulate={shown(accumulate)} must be a whole number of at "
      "least 1."
    )
  if accumulate > 1 and (over not in ("batch", "mesh") or choices != "all"):
    raise ValueError(
      f"load_balance: accumulate={accumulate} with over={over!r}, choices={choices!r}; "
      "it gathers all choices of whole batches: use over='batch' or 'mesh', and 'all'."
    )


@marked(check=_check)
def load_balance(
  plan: Plan,
  context: Context,
  *,
  over: str = "batch",
  choices: str = "all",
  accumulate: int = 1,
  axes: _scope.Axes = None,
  before: Array | None = None,
) -> Array:
  """f32[]: E * sum_e f_e P_e; 1 at perfect balance, E if one expert takes all.

  f_e is the share of choices that fall on expert e, counted before capacity; P_e is the
  mean over tokens of the expert's score, each token's scores divided by their sum.  The
  gradient goes through P alone.

  Source: Fedus, Zoph, Shazeer 2021, arXiv 2101.03961, equations 4 to 6.  With
  `choices="first"` it is Lepikhin et al. 2020 (GShard), arXiv 2006.16668, algorithm 1,
  times E^2 as in its authors' code.  With `over="sequence"` it is the complementary
  loss of DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; with `over="mesh"` the
  global-batch loss of Qiu et al. 2025, arXiv 2501.11873.  Some implementations are k
  times this one where tokens make k choices.

  Args:
    plan: of a token-choice router.
    context: `valid`; `row` and `num_rows` for `over="sequence"`.
    over: tokens pooled in f and P: those of a "sequence", of a routing "group", of the
      "batch" (here: of this shard) or of the "mesh".  The mean is taken over scopes
      that hold a valid token.
    choices: "all" k of them count in f, or only the "first".
    accumulate: batches of one update over which choices are gathered, as gradients
      are: f is of this batch and of those before it (`State.counted`; arXiv
      2501.11873 does so), P of this batch alone.
    axes: mesh axes of `over="mesh"`: sums f and P over them (three small psums).
    before: i32[E] choices of the earlier batches of the update.

  Raises:
    ValueError: a router without a fixed number of choices, or an unknown argument.
  """
  _check(None, over=over, choices=choices, accumulate=accumulate)
  routing = _scope.token_choice(plan, "load_balance")
  valid_T = valid_or_all(context, routing.num_tokens)
  score_TE = _scope.normalised(routing.probs, valid_T)
  sums = _scope.sums(over, routing, context, axes)

  counted = routing.k if choices == "all" else 1
  expert_TK = routing.expert.reshape(-1, routing.k)[:, :counted]
  live_TK = routing.live.reshape(-1, routing.k)[:, :counted] & valid_T[:, None]
  # Compare and sum over K: XLA fuses the [T,K,E] comparison into the reduction.
  expert_E = jnp.arange(routing.num_experts, dtype=expert_TK.dtype)
  chosen_TKE = expert_TK[:, :, None] == expert_E
  chosen_TE = (chosen_TKE & live_TK[:, :, None]).sum(1, dtype=score_TE.dtype)

  count_ZE, total_ZE = sums(chosen_TE), sums(score_TE)
  if accumulate > 1 and before is not None:
    count_ZE += before.astype(count_ZE.dtype)
  tokens_Z = sums(valid_T.astype(score_TE.dtype))
  f_ZE = count_ZE / jnp.maximum(count_ZE.sum(-1, keepdims=True), 1)
  p_ZE = total_ZE / jnp.maximum(tokens_Z[:, None], 1)
  loss_Z = routing.num_experts * (f_ZE * p_ZE).sum(-1)
  return sums.mean(loss_Z, tokens_Z)
