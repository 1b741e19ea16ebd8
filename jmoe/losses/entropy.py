"""The entropy losses of LIMoE: each token sure of its experts, a modality using many.

Both may be asked for one modality; two modalities are two entries in `losses`.
"""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe._ranges import in_range
from jmoe.losses import _scope
from jmoe.types import Context, Plan, valid_or_all
from jmoe.use import marked


def _check(
  config,
  *,
  modality: int | None = None,
  threshold: float | None = None,
  over: str = "batch",
) -> None:
  del config, modality
  _scope.check_scope(over)
  if threshold is not None:
    in_range("entropy_global: threshold", threshold)


@marked(check=_check, any_router=True)
def entropy_local(
  plan: Plan,
  context: Context,
  *,
  modality: int | None = None,
  over: str = "batch",
  axes: _scope.Axes = None,
) -> Array:
  """f32[]: mean entropy of a token's scores, nats; 0 if sure, ln E if undecided.

  Source: Mustafa et al. 2022 (LIMoE), arXiv 2206.02770, section 2.2, local loss.

  Args:
    plan: of any sparse router.
    context: `valid`; `modality` if one is asked for.
    modality: the value of `context.modality` that counts; None: every valid token.
    over: "sequence", "group", "batch" or "mesh": a mean over the tokens of each, then
      over those that hold a token that counts.
    axes: mesh axes of `over="mesh"`.

  Raises:
    ValueError: a modality, but no `context.modality`.
  """
  p_TE, counts_T, sums = _scores(plan, context, modality, over, axes)
  tokens_Z = sums(counts_T.astype(p_TE.dtype))
  total_Z = sums(_scope.entropy(p_TE))
  return sums.mean(total_Z / jnp.maximum(tokens_Z, 1), tokens_Z)


@marked(check=_check, any_router=True)
def entropy_global(
  plan: Plan,
  context: Context,
  *,
  modality: int | None = None,
  threshold: float | None = None,
  over: str = "batch",
  axes: _scope.Axes = None,
) -> Array:
  """f32[]: minus the entropy of the mean score, nats; -ln E at balance.

  With a threshold it is max(0, threshold + that): at balance 0 if threshold <= ln E,
  and without gradient as soon as the tokens spread over exp(threshold) experts.

  Source: Mustafa et al. 2022 (LIMoE), arXiv 2206.02770, section 2.2, global loss.

  Args:
    plan: of any sparse router.
    context: `valid`; `modality` if one is asked for.
    modality: the value of `context.modality` that counts; None: every valid token.
    threshold: nats; ln S asks that the tokens use S experts.  None: no threshold.
    over: "sequence", "group", "batch" or "mesh": tokens in the mean score.  The loss is
      a mean over scopes that hold a token that counts.
    axes: mesh axes of `over="mesh"`: scores are averaged over them before the entropy.

  Raises:
    ValueError: a modality, but no `context.modality`.
  """
  p_TE, counts_T, sums = _scores(plan, context, modality, over, axes)
  tokens_Z = sums(counts_T.astype(p_TE.dtype))
  mean_ZE = sums(p_TE) / jnp.maximum(tokens_Z[:, None], 1)
  loss_Z = -_scope.entropy(mean_ZE)
  if threshold is not None:
    loss_Z = jnp.maximum(0, threshold + loss_Z)
  return sums.mean(loss_Z, tokens_Z)


def _scores(plan, context, modality, over, axes):
  """Normalised scores of the tokens that count, which these are, and their sums."""
  routing = plan.routing
  counts_T = valid_or_all(context, routing.num_tokens)
  if modality is not None:
    if context.modality is None:
      raise ValueError(
        f"entropy loss: modality={modality} but the context has none; pass "
        "Context(modality=...), one id per token."
      )
    counts_T = counts_T & (context.modality == modality)
  p_TE = _scope.normalised(routing.probs, counts_T)
  return p_TE, counts_T, _scope.sums(over, routing, context, axes)
