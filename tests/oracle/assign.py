"""Oracle: entries queue at their experts, each queue is cut at capacity."""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np

from tests.oracle.routers import ranks
from tests.oracle.scores import softmax

RENORMALISE = ("never", "before_dropping", "after_dropping", "over_chosen", "ones")


def assign(
  entries,
  num_experts,
  num_tokens,
  group_size=None,
  capacity=None,
  priority=None,
  valid=None,
):
  """(slot i64[N], kept bool[N], load i64[G,E]): a queue per group and expert.

  Group g holds tokens [g * group_size, (g + 1) * group_size), the last one perhaps
  fewer.  A queue is ordered by `priority` (one number per entry, higher first, ties to
  the earlier entry), by default choice rank and then token.  A slot is the place among
  all entries that queue (-1 for those that do not); an entry is kept if it is live and
  its slot is below the capacity: None, an int, a tuple per expert, or a function of
  (valid tokens in the group, expert).
  """
  size = group_size or max(num_tokens, 1)
  num_groups = max(1, math.ceil(num_tokens / size))
  rank = ranks(entries)
  valid = [True] * num_tokens if valid is None else valid
  slot = np.full(len(entries), -1)
  kept = np.zeros(len(entries), bool)
  load = np.zeros((num_groups, num_experts), int)
  for g in range(num_groups):
    members = range(g * size, min((g + 1) * size, num_tokens))
    num_valid = sum(bool(valid[t]) for t in members)
    for e in range(num_experts):
      queue = [
        n
        for n, entry in enumerate(entries)
        if entry.queues and entry.expert == e and entry.token in members
      ]
      if priority is None:
        queue.sort(key=lambda n: (rank[n], entries[n].token))
      else:
        queue.sort(key=lambda n: (-priority[n], n))
      limit = _capacity(capacity, num_valid, e)
      load[g, e] = len(queue)
      for place, n in enumerate(queue):
        slot[n] = place
        kept[n] = entries[n].live and place < limit
  return slot, kept, load


def _capacity(capacity, num_valid, expert):
  """The number of slots of one queue; infinite if there is no capacity."""
  if capacity is None:
    return math.inf
  if isinstance(capacity, (int, np.integer)):
    return capacity
  if isinstance(capacity, (tuple, list, np.ndarray)):
    return capacity[expert]
  return capacity(num_valid, expert)


def by_choice_rank(entries):
  """Priority: all first choices, then all second choices, ..., each in token order."""
  return [-r for r in ranks(entries)]


def by_confidence(entries):
  """Priority: choice rank, then the weight of the token's FIRST choice (BPR)."""
  rank = ranks(entries)
  first = {}
  for entry in entries:
    first.setdefault(entry.token, entry.weight)
  order = sorted(
    range(len(entries)),
    key=lambda n: (rank[n], -first[entries[n].token], entries[n].token),
  )
  priority = [0] * len(entries)
  for place, n in enumerate(order):
    priority[n] = -place
  return priority


def by_weight(entries):
  """Priority: the entry's own weight, choice ranks mixed (drop_policy=probs)."""
  return [entry.weight for entry in entries]


def bounded(load, max_rows):
  """The largest cap c with sum(min(load_e, c)) <= max_rows (max(load) if all fit)."""
  load = [int(n) for n in np.ravel(load)]
  cap = 0
  while cap < max(load) and sum(min(n, cap + 1) for n in load) <= max_rows:
    cap += 1
  return cap


def drop_overflow(slot, kept, cap):
  """Kept entries that also find a row in a dropless buffer: slot < cap."""
  return np.asarray(kept, bool) & (np.asarray(slot) < cap)


def dropped_fraction(entries, kept):
  """Live entries that were not kept, as a fraction of the live ones (0 if none)."""
  live = sum(entry.live for entry in entries)
  lost = sum(entry.live and not k for entry, k in zip(entries, kept, strict=True))
  return lost / live if live else 0.0


def renormalise(entries, kept, rule, scale=1.0, logits=None):
  """Final weights f64[N].  An entry outside the rule's set, and a zero sum, give zero.

  never            scale * weight                                 of the live entries
  before_dropping  scale * weight / the token's sum over them     of the live entries
  after_dropping   scale * weight / the token's sum over them     of the kept entries
  over_chosen      scale * softmax of the token's logits over     the live entries
  ones             scale                                          of the live entries
  """
  if rule not in RENORMALISE:
    raise ValueError(rule)
  values = [entry.weight for entry in entries]
  if rule == "over_chosen":
    if logits is None:
      raise ValueError("over_chosen needs logits")
    values = [float(logits[entry.token][entry.expert]) for entry in entries]
  weights = np.zeros(len(entries))
  for t in {entry.token for entry in entries}:
    mine = [
      n
      for n, entry in enumerate(entries)
      if entry.token == t and (kept[n] if rule == "after_dropping" else entry.live)
    ]
    if not mine:
      continue
    parts = np.array([values[n] for n in mine])
    if rule == "ones":
      parts = np.ones(len(mine))
    elif rule == "over_chosen":
      parts = softmax(parts)
    elif rule != "never":
      parts = parts / sum(parts) if sum(parts) else 0 * parts
    for n, part in zip(mine, parts, strict=True):
      weights[n] = scale * part
  return weights
