"""Top-k of noisy logits, with what the load loss needs (V-MoE)."""
# SPDX-License-Identifier: Apache-2.0

import math

import jax
from jax import Array

from jmoe.noise import gaussian
from jmoe.routers.token_choice import check_k, choices_of, token_choice
from jmoe.types import Context, Routing
from jmoe.use import marked


def _check(config, *, k: int, noise_std: float = 1.0) -> None:
  check_k(config, k=k)
  if not 0 <= noise_std < math.inf:
    raise ValueError(
      f"noisy_top_k: noise_std={noise_std} must be a finite number from 0 up."
    )


@marked(
  check=_check,
  choices=lambda num_experts, k, **_: k,
  random=lambda train, **_: train,
  reads=(),
  takes_best=True,
)
def noisy_top_k(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  k: int,
  mask: Array | None = None,
  context: Context = Context(),
  key: Array | None = None,
  train: bool = False,
  forced: Array | None = None,
  noise_std: float = 1.0,
) -> Routing:
  """Selects and weighs by `softmax(logits + N(0, (noise_std/E)^2))` in training.

  V-MoE (arXiv 2106.05974), section 2.2: softmax before top-k, weights not
  renormalised.  Outside training there is no noise.

  Args:
    logits: f32[T,E] clean logits.
    scores, select: not read; the scores of this router are a softmax.
    k: experts per token.
    mask: bool[T,E] allowed experts.
    context: `valid`, `group_size`, `position`.
    key: needed in training.
    train: whether noise is drawn.
    forced: i32[T,K] recorded choices to replay.
    noise_std: standard deviation times E; the load loss must be told the same.

  Returns:
    Routing with `noisy_logits` set in training.
  """
  del scores, select
  noisy = logits
  if train and key is not None:
    noisy = gaussian(logits, context=context, key=key, std=noise_std)
  scores = jax.nn.softmax(noisy)
  return token_choice(
    choices_of(noisy, mask, k),
    logits=logits,
    scores=scores,
    context=context,
    mask=mask,
    forced=forced,
    noisy_logits=noisy if train else None,
  )
