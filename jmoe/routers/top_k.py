"""The k best experts of every token: nearly every system."""
# SPDX-License-Identifier: Apache-2.0

import math

from jax import Array

from jmoe.routers.token_choice import check_k, choices_of, token_choice
from jmoe.types import Context, Routing
from jmoe.use import marked


def _check(config, *, k: int, scale: float = 1.0) -> None:
  check_k(config, k=k)
  if not 0 < scale < math.inf:
    raise ValueError(f"top_k: scale={scale} must be a positive number.")


@marked(check=_check, choices=lambda num_experts, k, **_: k, takes_best=True)
def top_k(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  k: int,
  mask: Array | None = None,
  context: Context = Context(),
  forced: Array | None = None,
  scale: float = 1.0,
) -> Routing:
  """Selects the k highest of `select`, weighs them by `scores`.

  Shazeer et al. 2017 (arXiv 1701.06538), Switch (2101.03961) with k=1; DeepSeek-V3
  (2412.19437, equation 16) selects by score plus bias.  Weights are the scores as they
  are, times `scale`; a softmax over the chosen (Mixtral) or any other normalisation is
  the `renormalise` stage, after which weights sum to `scale`.

  Args:
    logits: f32[T,E] before scoring, kept for losses.
    scores: f32[T,E] what weights are read from.
    select: f32[T,E] what experts are selected by; no gradient flows through it.
    k: experts per token.
    mask: bool[T,E] allowed experts.
    context: `valid`, `group_size`.
    forced: i32[T,K] recorded choices to replay.
    scale: routed scaling factor (2.5 in DeepSeek-V3).

  Returns:
    Routing with T*k entries; ties go to the lower expert index.
  """
  return token_choice(
    choices_of(select, mask, k),
    logits=logits,
    scores=scores,
    context=context,
    mask=mask,
    forced=forced,
    scale=scale,
  )
