"""Oracle: scores to entries of the sparse tokens-by-experts matrix.

Every token-choice router returns its entries token by token, choices in order; so the
rank of a choice is the number of earlier entries of the same token.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import numpy as np

from tests.oracle.scores import softmax


@dataclasses.dataclass(frozen=True)
class Entry:
  """One (token, expert) pair: its weight, whether it may run, whether it queues."""

  token: int
  expert: int
  weight: float
  live: bool
  queues: bool


def top_k(logits, scores, select, k, mask=None, valid=None, scale=1.0):
  """Each token's k highest of `select`, weighed by scale * scores.

  Ties go to the lowest expert.  Experts outside `mask` come after all allowed ones
  and are never live; nothing of an invalid token is live or queues.
  """
  num_tokens, num_experts = np.shape(logits)
  mask, valid = _given(mask, (num_tokens, num_experts)), _given(valid, (num_tokens,))
  entries = []
  for t in range(num_tokens):
    for e in _best_first(select[t], mask[t], range(num_experts))[:k]:
      live = bool(valid[t] and mask[t][e])
      entries.append(Entry(t, e, scale * float(scores[t][e]), live, live))
  return entries


def top_2(
  scores,
  policy="all",
  u=None,
  gumbel=None,
  logits=None,
  threshold=0.2,
  compare="normalised",
  skipped_holds_slot=False,
  weigh="raw",
  mask=None,
  valid=None,
):
  """GShard's top 2; `policy` decides whether, or which, second expert is used.

  The first is the argmax of the scores; the second the argmax of the rest, or under
  `sampling` the argmax of logits + gumbel over the rest.  It is used
    all, sampling: always        random: iff u < g2 / threshold
    none: never                  threshold: iff g2 > threshold
  with g2 = s2 / (s1 + s2) if compare is "normalised", s2 if "raw".  A skipped second
  choice is not live, and queues only if `skipped_holds_slot` (GShard's Algorithm 1).
  Weights are the scores if `weigh` is "raw"; if "pair" they are divided by s1 + s2
  before anything is skipped, as in Algorithm 1, lingvo and mesh: there a skipped second
  choice takes its mass with it, which renormalising over live entries would undo.
  """
  num_tokens, num_experts = np.shape(scores)
  if policy not in ("all", "random", "sampling", "threshold", "none"):
    raise ValueError(policy)
  if num_experts < 2:
    raise ValueError("top_2 needs two experts")
  if compare not in ("normalised", "raw") or weigh not in ("raw", "pair"):
    raise ValueError(compare, weigh)
  draws, by = np.zeros(num_tokens), scores
  if policy == "random":
    if u is None:
      raise ValueError("random needs u")
    draws = u
  if policy == "sampling":
    if logits is None or gumbel is None:
      raise ValueError("sampling needs logits and gumbel")
    by = np.add(logits, gumbel, dtype=np.float64)
  mask, valid = _given(mask, (num_tokens, num_experts)), _given(valid, (num_tokens,))
  entries = []
  for t in range(num_tokens):
    first = _best_first(scores[t], mask[t], range(num_experts))[0]
    rest = [e for e in range(num_experts) if e != first]
    second = _best_first(by[t], mask[t], rest)[0]

    live_1 = bool(valid[t] and mask[t][first])
    may_2 = bool(valid[t] and mask[t][second])
    s1, s2 = float(scores[t][first]), float(scores[t][second])
    pair = (s1 + (s2 if may_2 else 0.0)) or 1.0  # both zero: divide by one
    g2 = s2 / pair if compare == "normalised" else s2
    if policy == "random":
      use = bool(draws[t] < g2 / threshold)
    elif policy == "threshold":
      use = bool(g2 > threshold)
    else:
      use = policy in ("all", "sampling")

    w1, w2 = (s1 / pair, s2 / pair) if weigh == "pair" else (s1, s2)
    entries.append(Entry(t, first, w1, live_1, live_1))
    queues_2 = may_2 and (use or skipped_holds_slot)
    entries.append(Entry(t, second, w2, may_2 and use, queues_2))
  return entries


def expert_choice(scores, capacity, group_size=None, valid=None, mask=None):
  """Each expert's `capacity[g]` highest-scored tokens of group g (2202.09368).

  Entries are ordered group, expert, pick; ties go to the earlier token.  Invalid or
  masked tokens are picked last and are not live.  A group shorter than its capacity
  gives all its tokens.
  """
  num_tokens, num_experts = np.shape(scores)
  mask, valid = _given(mask, (num_tokens, num_experts)), _given(valid, (num_tokens,))
  size = group_size or max(num_tokens, 1)
  entries = []
  for g, start in enumerate(range(0, num_tokens, size)):
    tokens = range(start, min(start + size, num_tokens))
    for e in range(num_experts):
      column = [scores[t][e] for t in range(num_tokens)]
      may = [bool(valid[t] and mask[t][e]) for t in range(num_tokens)]
      for t in _best_first(column, may, tokens)[: capacity[g]]:
        entries.append(Entry(t, e, float(column[t]), may[t], may[t]))
  return entries


def hashed(token_id, table, valid=None, mask=None):
  """Experts table[token_id] (one, or a row of several) with weight 1 (2106.04426)."""
  num_tokens = len(token_id)
  valid = _given(valid, (num_tokens,))
  entries = []
  for t in range(num_tokens):
    for e in np.atleast_1d(table[int(token_id[t])]):
      live = bool(valid[t] and (mask is None or mask[t][e]))
      entries.append(Entry(t, int(e), 1.0, live, live))
  return entries


def every_expert(scores, mask=None, valid=None):
  """All experts of every token, in expert order, weighed by their scores."""
  num_tokens, num_experts = np.shape(scores)
  mask, valid = _given(mask, (num_tokens, num_experts)), _given(valid, (num_tokens,))
  entries = []
  for t in range(num_tokens):
    for e in range(num_experts):
      live = bool(valid[t] and mask[t][e])
      entries.append(Entry(t, e, float(scores[t][e]), live, live))
  return entries


def forced(ids, scores, valid=None, scale=1.0):
  """Recorded experts ids[T,K] replayed with today's scores; -1 is an unused choice."""
  num_tokens = len(ids)
  valid = _given(valid, (num_tokens,))
  entries = []
  for t in range(num_tokens):
    for e in ids[t]:
      if e < 0:
        entries.append(Entry(t, 0, 0.0, False, False))
      else:
        live = bool(valid[t])
        entries.append(Entry(t, int(e), scale * float(scores[t][e]), live, live))
  return entries


def soft(logits, valid=None):
  """Soft MoE's (dispatch, combine), each [G,S,E,C], from logits [G,S,E,C].

  Dispatch: softmax over the valid tokens of a group, per slot.  Combine: softmax over
  all slots of all experts, per token.  Both are zero for invalid tokens (2308.00951).
  """
  logits = np.asarray(logits, np.float64)
  num_groups, num_tokens, num_experts, capacity = logits.shape
  valid = _given(valid, (num_groups, num_tokens))
  dispatch, combine = np.zeros(logits.shape), np.zeros(logits.shape)
  for g in range(num_groups):
    tokens = [s for s in range(num_tokens) if valid[g][s]]
    for s in tokens:
      combine[g, s] = softmax(logits[g, s].reshape(-1)).reshape(num_experts, capacity)
    for e in range(num_experts):
      for c in range(capacity):
        if tokens:
          dispatch[g, tokens, e, c] = softmax(logits[g, tokens, e, c])
  return dispatch, combine


def ranks(entries):
  """Choice rank of each entry: how many earlier entries its token has."""
  seen, out = {}, []
  for entry in entries:
    out.append(seen.get(entry.token, 0))
    seen[entry.token] = out[-1] + 1
  return out


def as_matrix(entries, values, num_tokens, num_experts):
  """Dense [T,E] sum of `values` (one per entry): compares entries in any order."""
  matrix = np.zeros((num_tokens, num_experts))
  for entry, value in zip(entries, values, strict=True):
    matrix[entry.token, entry.expert] += value
  return matrix


def _best_first(values, allowed, indices):
  """`indices`: allowed ones first, then highest value, then lowest index."""
  return sorted(indices, key=lambda i: (not allowed[i], -float(values[i]), i))


def _given(flags, shape):
  """The flags as booleans of `shape`, all true if None."""
  return np.ones(shape, bool) if flags is None else np.asarray(flags, bool)
