"""Top-2 with a rule for the second expert: GShard and its descendants."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.noise._keys import per_token
from jmoe.routers.token_choice import choices_of, pick, token_choice
from jmoe.types import Context, Routing
from jmoe.use import marked, nearest

POLICIES = ("all", "random", "sampling", "threshold", "none")


def _check(
  config,
  *,
  policy: str = "random",
  eval_policy: str = "all",
  threshold: float = 0.5,
  compare: str = "normalised",
  skipped_holds_slot: bool = False,
) -> None:
  del skipped_holds_slot
  if config.num_experts < 2:
    raise ValueError(
      f"top_2: num_experts={config.num_experts}; use 2 or more, or top_k with k=1."
    )
  for name, value in (("policy", policy), ("eval_policy", eval_policy)):
    if value not in POLICIES:
      raise ValueError(f"top_2: {name}={value!r}; {nearest(value, POLICIES)}")
  if compare not in ("normalised", "raw"):
    raise ValueError(f"top_2: compare={compare!r}; use 'normalised' or 'raw'.")
  if not threshold > 0:
    raise ValueError(f"top_2: threshold={threshold} must be positive.")


def _random(train: bool, policy: str = "random", eval_policy: str = "all", **_) -> bool:
  return (policy if train else eval_policy) in ("random", "sampling")


def _runs(policy: str = "random", **_) -> int:
  return 1 if policy == "none" else 2


@marked(check=_check, choices=lambda num_experts, **_: 2, random=_random, runs=_runs)
def top_2(
  logits: Array,
  scores: Array,
  select: Array,
  *,
  mask: Array | None = None,
  context: Context = Context(),
  key: Array | None = None,
  train: bool = False,
  forced: Array | None = None,
  policy: str = "random",
  eval_policy: str = "all",
  threshold: float = 0.5,
  compare: str = "normalised",
  skipped_holds_slot: bool = False,
) -> Routing:
  """The best expert always, the second by policy.

  GShard (arXiv 2006.16468), algorithm 1, and the codes that followed it.

  Args:
    logits, scores, select: f32[T,E]; weights are the raw scores (see `renormalise`).
    mask: bool[T,E] allowed experts.
    context: `valid`, `group_size`, `position`.
    key: needed where the policy draws.
    train: chooses between the two policies.
    forced: i32[T,2] recorded choices to replay; -1 for a second one that was skipped.
    policy: what becomes of the second expert in training.
      "all": kept.
      "random": kept with probability `min(1, g2 / threshold)`; the paper's `2 * g2` is
      threshold 0.5, Mesh-TensorFlow's default is 0.2.
      "sampling": drawn by Gumbel-max from the softmax of the remaining logits.
      "threshold": kept if `g2 > threshold`.
      "none": never (top-1).
    eval_policy: the same outside training; fairseq and DeepSpeed sample there too.
    threshold: see `policy`.
    compare: g2 is "normalised", `g2 / (g1 + g2)`, as in the paper, or "raw" (fairseq).
    skipped_holds_slot: whether a skipped second choice keeps its place in the queue,
      as the paper's algorithm has it; the published codes free it.

  Returns:
    Routing with 2*T entries, the first choice first.
  """
  T = scores.shape[0]
  policy = policy if train else eval_policy
  expert_T2 = choices_of(select, mask, 2)
  if policy in ("random", "sampling") and key is None and forced is None:
    raise ValueError(f"top_2: policy {policy!r} draws random numbers; pass key=...")
  if policy == "sampling" and key is not None:
    drawn = per_token(
      lambda k: jax.random.gumbel(k, logits.shape[1:], logits.dtype), key, context, T
    )
    first_TE = expert_T2[:, :1] == jnp.arange(scores.shape[1], dtype=jnp.int32)
    rest_TE = jnp.where(first_TE, -jnp.inf, logits + drawn)
    expert_T2 = jnp.concatenate(
      [expert_T2[:, :1], choices_of(rest_TE, mask, 1)], axis=1
    )
  g_T2 = jax.lax.stop_gradient(pick(scores, expert_T2))
  g2_T = g_T2[:, 1]
  if compare == "normalised":
    g2_T = g2_T / jnp.maximum(g_T2[:, 0] + g_T2[:, 1], 1e-9)
  if policy == "random" and key is not None:
    u_T = per_token(lambda k: jax.random.uniform(k, (), g2_T.dtype), key, context, T)
    second_T = u_T < g2_T / threshold
  elif policy == "threshold":
    second_T = g2_T > threshold
  else:
    second_T = jnp.full(T, policy != "none")
  live_T2 = jnp.stack([jnp.ones(T, bool), second_T], axis=1)
  return token_choice(
    expert_T2,
    logits=logits,
    scores=scores,
    context=context,
    mask=mask,
    forced=forced,
    live_TK=live_T2,
    queues_TK=jnp.ones_like(live_T2) if skipped_holds_slot else live_T2,
  )
