"""The routing front again in NumPy, in loops over tokens and choices."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import numpy as np

_SAMPLE = 256  # tokens whose choices are looked at
_WRONG = 2e-2  # relative error of bfloat16 that is no rounding


def made(config: Any, params: Any, x_TD: Any) -> tuple[Any, Any, Any]:
  """(y_TD, plan, layout) of a layer."""
  import jax

  import jmoe
  from jmoe.dispatch.layout import equal, ragged
  from jmoe.kernels.devices import row_alignment

  def run(params, x_TD):
    y_TD, info = jmoe.moe(params, x_TD, config, with_plan=True)
    plan = info.plan
    mean = plan.order.shape[0] / config.num_experts
    if plan.capacity is None:
      layout = ragged(plan, alignment=row_alignment(x_TD.dtype, mean))
    else:
      layout = equal(plan, alignment=row_alignment(x_TD.dtype))
    return y_TD, plan, layout

  return jax.jit(run)(params, x_TD)


def wrong(
  config: Any, params: Any, x_TD: Any, y_TD: Any, plan: Any, layout: Any
) -> str | None:
  """What is wrong with a layer's scores, choices, plan, layout or output, if anything.

  Args:
    config: softmax or sigmoid scores, top-k, weights that sum to one; dropless, or with
      a capacity by a factor.
    params, x_TD: its operands.
    y_TD, plan, layout: from `made`.
  """
  import jax

  E, k = config.num_experts, config.k
  routing = jax.tree.map(np.asarray, plan.routing)
  expert_TK = routing.expert.reshape(-1, k)
  sample = np.linspace(0, len(expert_TK) - 1, _SAMPLE).astype(int)
  factor = None if config.capacity is None else config.capacity.get("factor")
  return (
    _choices(config, routing, expert_TK, sample)
    or _plan(plan, layout, expert_TK, E, factor)
    or _output(params, x_TD, y_TD, plan, expert_TK, sample[:: _SAMPLE // 4])
  )


def _choices(config: Any, routing: Any, expert_TK: Any, sample: Any) -> str | None:
  weight_TK = routing.weight.reshape(expert_TK.shape)
  for t in sample:
    logits_E = routing.logits[t].astype(np.float64)
    if config.score.name == "softmax":
      score_E = np.exp(logits_E - logits_E.max())
      score_E /= score_E.sum()
    else:
      score_E = 1 / (1 + np.exp(-logits_E))
    if not np.allclose(routing.probs[t], score_E, rtol=1e-4, atol=1e-7):
      return f"scores of token {t}"
    # By the scores as they are: equal ones go to the lower index.
    best = sorted(range(len(score_E)), key=lambda e: (-routing.probs[t, e], e))
    best = best[: expert_TK.shape[1]]
    if list(expert_TK[t]) != best:
      return f"token {t} chose {list(expert_TK[t])} instead of {best}"
    share_K = score_E[best] / score_E[best].sum()
    if not np.allclose(weight_TK[t], share_K, rtol=1e-4, atol=1e-7):
      return f"weights of token {t}"
  return None


def _plan(
  plan: Any, layout: Any, expert_TK: Any, num_experts: int, factor: float | None
) -> str | None:
  """Queues by choice rank, then token (dropless: in any order), and rows by expert."""
  T, K = expert_TK.shape
  slot_N, kept_N = np.asarray(plan.slot), np.asarray(plan.kept)
  most = T * K if factor is None else math.ceil(K * T * factor / num_experts)
  queues = [[] for _ in range(num_experts)]
  for j in range(K):
    for t in range(T):
      queues[expert_TK[t, j]].append(t * K + j)
  if [len(queue) for queue in queues] != list(np.asarray(plan.load).sum(axis=0)):
    return "numbers of an expert's tokens"
  row_N, token_R = np.asarray(layout.row), np.asarray(layout.token)
  entry_R, start_E = np.asarray(layout.entry), np.asarray(layout.groups.start)
  taken = np.zeros(len(token_R), bool)
  for e, queue in enumerate(queues):
    places = sorted(slot_N[queue]) if factor is None else list(slot_N[queue])
    if places != list(range(len(queue))):
      return f"the queue of expert {e}"
    for n in queue:
      if kept_N[n] != (slot_N[n] < most):
        return f"what is kept of expert {e}"
      if not kept_N[n]:
        continue
      row = start_E[e] + slot_N[n]
      if row_N[n] != row or entry_R[row] != n or token_R[row] != n // K:
        return f"the row of choice {n}"
      taken[row] = True
  free = np.any(token_R[~taken] != T) or np.any(entry_R[~taken] != T * K)
  if free or np.any(row_N[~kept_N] != len(token_R)):
    return "rows that nobody has"
  return None


def _output(
  params: Any, x_TD: Any, y_TD: Any, plan: Any, expert_TK: Any, sample: Any
) -> str | None:
  weight_TK = np.asarray(plan.routing.weight).reshape(expert_TK.shape)
  kept_TK = np.asarray(plan.kept).reshape(expert_TK.shape)
  matrices = [params["experts"][name] for name in ("gate_EDF", "up_EDF", "down_EFD")]
  for t in sample:
    x_D = np.asarray(x_TD[t], np.float32)
    y_D = np.zeros_like(x_D)
    for e, weight in zip(expert_TK[t], weight_TK[t] * kept_TK[t], strict=True):
      gate, up, down = (np.asarray(m[e], np.float32) for m in matrices)
      gated = x_D @ gate
      y_D += weight * ((gated / (1 + np.exp(-gated)) * (x_D @ up)) @ down)
    error = np.linalg.norm(np.asarray(y_TD[t], np.float32) - y_D)
    if not error < _WRONG * max(np.linalg.norm(y_D), 1e-6):
      return f"the output of token {t}, by {error / np.linalg.norm(y_D):.1e}"
  return None
