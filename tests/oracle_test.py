"""The oracle's routing, against values worked by hand and Algorithm 1 of GShard."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from tests import oracle
from tests.oracle import capacity

# Four tokens, three experts.  First choices 0, 0, 1, 0; second choices 1, 2, 0, 1.
SCORES = np.array(
  [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.45, 0.35, 0.2]]
)
LOGITS = np.log(SCORES)


def pairs(entries, keep):
  """The (token, expert) pairs whose flag is set."""
  return [(e.token, e.expert) for e, k in zip(entries, keep, strict=True) if k]


def top_2_of_4(slots: int | None = 2, priority=None):
  entries = oracle.top_k(LOGITS, SCORES, SCORES, 2)
  values = priority(entries) if priority else None
  return entries, *oracle.assign(entries, 3, 4, capacity=slots, priority=values)


@pytest.mark.parametrize("name", oracle.CAPACITY_RULES)
def test_capacity_table(name):
  rule = oracle.CAPACITY_RULES[name]
  assert rule(**oracle.WORKED) == oracle.WORKED_CAPACITY[name]


def test_capacity_minimum_and_alignment():
  assert set(oracle.CAPACITY_RULES) == set(oracle.WORKED_CAPACITY)
  assert capacity.ceil(10, 4, 1, 1.0, minimum=4, multiple=8) == 8
  assert capacity.ceil(0, 4, 1, 1.0) == 0
  assert capacity.mesh(3, 1, 1, 9.0) == 4  # min(T, ...) first, then the minimum
  assert capacity.lingvo(3, 4, 2, 1.0) == 4
  assert capacity.lingvo(8, 4, 2, 1.0) == 4  # floor 2: aligned, not replaced
  assert capacity.deepspeed(8, 8, 1, 1.0) == 4
  assert capacity.flaxformer(18, 4, 1, 1.0) == 4  # 4.5 rounds to even
  assert capacity.tutel(9, 4, 2, 1.0, multiple=4) == 8


def test_top_2_of_four_tokens_with_drops():
  entries, slot, kept, load = top_2_of_4()
  assert pairs(entries, [True] * 8) == [
    *((0, 0), (0, 1), (1, 0), (1, 2)),
    *((2, 1), (2, 0), (3, 0), (3, 1)),
  ]
  # Expert 0: firsts 0, 1, 3, then second 2.  Expert 1: first 2, then seconds 0, 3.
  assert slot.tolist() == [0, 1, 1, 0, 0, 3, 2, 2]
  assert pairs(entries, kept) == [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)]
  assert load.tolist() == [[4, 3, 1]]
  assert oracle.dropped_fraction(entries, kept) == 3 / 8


@pytest.mark.parametrize(
  ("rule", "expected"),
  [
    ("never", [0.5, 0.3, 0.6, 0.3, 0.7, 0.2, 0.45, 0.35]),
    (
      "before_dropping",
      [5 / 8, 3 / 8, 2 / 3, 1 / 3, 7 / 9, 2 / 9, 4.5 / 8, 3.5 / 8],
    ),
    ("after_dropping", [5 / 8, 3 / 8, 2 / 3, 1 / 3, 1, 0, 0, 0]),
    ("over_chosen", [5 / 8, 3 / 8, 2 / 3, 1 / 3, 7 / 9, 2 / 9, 4.5 / 8, 3.5 / 8]),
  ],
)
def test_renormalisation_of_the_four_tokens(rule, expected):
  entries, _, kept, _ = top_2_of_4()
  weights = oracle.renormalise(entries, kept, rule, scale=2.0, logits=LOGITS)
  np.testing.assert_allclose(weights, 2 * np.array(expected))


def test_zero_sums_give_zero_weights():
  entries = oracle.top_k(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), 2)
  for rule in ("before_dropping", "after_dropping"):
    assert oracle.renormalise(entries, [True, True], rule).tolist() == [0, 0]


def test_forward_of_the_four_tokens():
  entries, _, kept, _ = top_2_of_4()
  weights = oracle.renormalise(entries, kept, "never")
  times = [lambda x, c=c: c * x for c in (1.0, 10.0, 100.0)]
  x = np.ones((4, 1))
  y = oracle.forward(x, entries, kept, weights, times)
  np.testing.assert_allclose(y[:, 0], [0.5 + 3, 0.6 + 30, 7, 0])
  stacked = oracle.forward(x, entries, kept, weights, times, stack=True)
  np.testing.assert_allclose(stacked[..., 0], [[1, 10], [1, 100], [10, 0], [0, 0]])
  squares = [lambda x: x**2] * 3
  y = oracle.forward(x, entries, kept, weights, squares, scale_input=True)
  np.testing.assert_allclose(y[:, 0], [0.25 + 0.09, 0.36 + 0.09, 0.49, 0])


def test_batch_priority_keeps_confident_tokens_first():
  # First-choice weights .5 .6 .7 .45: tokens queue 2, 1, 0, 3 within each rank.
  entries, slot, kept, _ = top_2_of_4(2, oracle.by_confidence)
  assert slot.tolist() == [1, 1, 0, 0, 0, 3, 2, 2]
  _, _, kept, _ = top_2_of_4(1, oracle.by_confidence)
  assert pairs(entries, kept) == [(1, 0), (1, 2), (2, 1)]


def test_batch_priority_ties_go_to_the_earlier_token():
  scores = np.array([[0.6, 0.4]] * 3)
  entries = oracle.top_k(scores, scores, scores, 1)
  slot, _, _ = oracle.assign(entries, 2, 3, priority=oracle.by_confidence(entries))
  assert slot.tolist() == [0, 1, 2]


def test_by_weight_mixes_ranks():
  # Expert 1: token 2 with .7, token 3 with .35, token 0 with .3.
  _, slot, _, _ = top_2_of_4(2, oracle.by_weight)
  assert slot.tolist() == [1, 2, 0, 0, 0, 3, 2, 1]
  _, slot, _, _ = top_2_of_4(2, oracle.by_choice_rank)
  assert slot.tolist() == top_2_of_4(2)[1].tolist()


def test_groups_and_capacity_from_valid_tokens():
  valid = [True, True, True, False, True]
  scores = np.array([[0.9, 0.1]] * 5)
  entries = oracle.top_k(scores, scores, scores, 1, valid=valid)
  slot, kept, load = oracle.assign(
    entries, 2, 5, group_size=2, capacity=lambda n, e: n - 1, valid=valid
  )
  assert slot.tolist() == [0, 1, 0, -1, 0]
  assert kept.tolist() == [True, False, False, False, False]
  assert load.tolist() == [[2, 0], [1, 0], [1, 0]]
  _, kept, _ = oracle.assign(entries, 2, 5, capacity=(3, 0))
  assert kept.tolist() == [True, True, True, False, False]


def test_top_k_ties_masks_and_select():
  scores = np.full((1, 4), 0.25)
  chosen = oracle.top_k(scores, scores, scores, 2)
  assert [e.expert for e in chosen] == [0, 1]
  mask = [[False, False, False, True]]
  chosen = oracle.top_k(scores, scores, scores, 2, mask=mask)
  assert [(e.expert, e.live, e.queues) for e in chosen] == [
    (3, True, True),
    (0, False, False),
  ]
  chosen = oracle.top_k(scores, scores, [[0, 0, 9, 1]], 2, scale=2.5)
  assert [(e.expert, e.weight) for e in chosen] == [(2, 0.625), (3, 0.625)]


def test_bounded_buffer_cuts_the_longest_queues():
  assert oracle.bounded([4, 3, 1], 8) == 4
  assert oracle.bounded([4, 3, 1], 7) == 3
  assert oracle.bounded([4, 3, 1], 6) == 2  # a cap of 3 would need 7 rows
  assert oracle.bounded([4, 3, 1], 2) == 0
  entries, slot, kept, load = top_2_of_4(None)
  kept = oracle.drop_overflow(slot, kept, oracle.bounded(load, 6))
  assert kept.tolist() == top_2_of_4(2)[2].tolist()


def algorithm_1(scores, u, slots, skipped_holds_slot):
  """GShard's Algorithm 1 as printed: two sequential passes; weights [T,E]."""
  out = np.zeros(scores.shape)
  count = [0] * scores.shape[1]
  for t, s in enumerate(scores):
    e2, e1 = np.argsort(s)[-2:]
    if count[e1] < slots:
      out[t, e1] = s[e1] / (s[e1] + s[e2])
    count[e1] += 1
  for t, s in enumerate(scores):
    e2, e1 = np.argsort(s)[-2:]
    g2 = s[e2] / (s[e1] + s[e2])
    use = 2 * g2 > u[t]
    if use and count[e2] < slots:
      out[t, e2] = g2
    if use or skipped_holds_slot:
      count[e2] += 1
  return out


@pytest.mark.parametrize("skipped_holds_slot", [True, False])
def test_gshard_algorithm_1(skipped_holds_slot):
  rng = np.random.default_rng(0)
  for case in range(100):
    num_experts, slots = (2, 3, 7)[case % 3], case % 5
    scores = oracle.softmax(rng.normal(size=(11, num_experts)))
    u = rng.uniform(size=11)
    options = {"skipped_holds_slot": skipped_holds_slot, "weigh": "pair"}
    entries = oracle.top_2(scores, "random", u, threshold=0.5, **options)
    _, kept, _ = oracle.assign(entries, num_experts, 11, capacity=slots)
    weights = kept * oracle.renormalise(entries, kept, "never")
    np.testing.assert_allclose(
      oracle.as_matrix(entries, weights, 11, num_experts),
      algorithm_1(scores, u, slots, skipped_holds_slot),
    )


def test_skipped_second_choice_and_its_slot():
  # Both tokens' second choice is expert 2; token 0 skips it, token 1 uses it.
  scores = np.array([[0.6, 0.0, 0.4], [0.0, 0.6, 0.4]])
  for holds, kept_1, load_2 in ((True, False, 2), (False, True, 1)):
    entries = oracle.top_2(
      scores, "random", [0.9, 0.1], threshold=0.5, skipped_holds_slot=holds
    )
    assert [e.weight for e in entries] == [0.6, 0.4] * 2
    _, kept, load = oracle.assign(entries, 3, 2, capacity=1)
    assert kept.tolist() == [True, False, True, kept_1]
    assert load[0, 2] == load_2


def test_pair_weights_lose_the_mass_of_a_skipped_or_forbidden_choice():
  scores = np.array([[0.3, 0.1, 0.6]])
  for policy, mask, first in (
    ("all", None, 0.6 / 0.9),
    ("none", None, 0.6 / 0.9),  # skipped: its mass is lost
    ("all", [[False, False, True]], 1.0),  # forbidden: it never had any
  ):
    entries = oracle.top_2(scores, policy, weigh="pair", mask=mask)
    np.testing.assert_allclose(entries[0].weight, first)
  entries = oracle.top_2(scores, "none")
  weights = oracle.renormalise(entries, [True, False], "before_dropping")
  assert weights.tolist() == [1.0, 0.0]  # over the live entries


def test_second_expert_policies():
  scores = np.array([[0.5, 0.3, 0.2], [0.8, 0.15, 0.05]])  # g2 = .375, .158 normalised

  def second(policy, **options):
    entries = oracle.top_2(scores, policy, **options)
    return [(e.expert, e.live) for e in entries if e.expert != 0]

  assert second("all") == [(1, True), (1, True)]
  assert second("none") == [(1, False), (1, False)]
  assert second("threshold", threshold=0.2) == [(1, True), (1, False)]
  assert second("threshold", threshold=0.35) == [(1, True), (1, False)]
  assert second("threshold", threshold=0.35, compare="raw") == [(1, False), (1, False)]
  assert second("random", u=[0.99, 0.78], threshold=0.2) == [(1, True), (1, True)]
  assert second("random", u=[0.99, 0.80], threshold=0.2) == [(1, True), (1, False)]
  gumbel = [[99, 0, 5], [99, 0, 1]]
  assert second("sampling", gumbel=gumbel, logits=np.log(scores)) == [
    (2, True),
    (1, True),
  ]


def test_expert_choice_takes_each_experts_best_tokens():
  entries = oracle.expert_choice(SCORES, [2, 1], group_size=2)
  assert [(e.token, e.expert) for e in entries] == [
    *((1, 0), (0, 0), (0, 1), (1, 1), (1, 2), (0, 2)),
    *((3, 0), (2, 1), (3, 2)),
  ]
  entries = oracle.expert_choice(SCORES, [2], valid=[True, False, False, False])
  assert pairs(entries, [e.live for e in entries]) == [(0, 0), (0, 1), (0, 2)]
  slot, _, load = oracle.assign(entries, 3, 4, priority=oracle.by_weight(entries))
  assert slot.tolist() == [0, -1] * 3 and load.tolist() == [[1, 1, 1]]


def test_hashed_every_expert_and_forced():
  assert oracle.hashed([2, 0], [5, 6, 7]) == [
    oracle.Entry(0, 7, 1.0, True, True),
    oracle.Entry(1, 5, 1.0, True, True),
  ]
  every = oracle.every_expert(SCORES, valid=[True, True, True, False])
  weights = oracle.as_matrix(every, [e.weight for e in every], 4, 3)
  np.testing.assert_array_equal(weights, SCORES)
  assert sum(e.live for e in every) == 9
  replay = oracle.forced([[2, -1]], SCORES[:1])
  assert replay == [
    oracle.Entry(0, 2, 0.2, True, True),
    oracle.Entry(0, 0, 0.0, False, False),
  ]


def test_soft_rows_sum_to_one_and_skip_padding():
  logits = np.random.default_rng(0).normal(size=(2, 3, 2, 2))
  valid = np.array([[True, True, False], [False, False, False]])
  dispatch, combine = oracle.soft(logits, valid)
  np.testing.assert_allclose(dispatch.sum(axis=1), [np.ones((2, 2)), np.zeros((2, 2))])
  np.testing.assert_allclose(combine.sum(axis=(2, 3)), valid)
  uniform = oracle.soft(np.zeros((1, 3, 2, 1)))
  y = oracle.soft_forward(
    np.arange(3.0).reshape(1, 3, 1), *uniform, [oracle.copy, lambda x: 3 * x]
  )
  np.testing.assert_allclose(y, np.full((1, 3, 1), 2.0))  # mean token 1, times 1 and 3
