"""Choices token by token: loops over tokens, all shuffles, and the ideal routings."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import numpy as np
import pytest

from jmoe.analysis import routes, specialisation

pytestmark = pytest.mark.contract


def drawn(seed, tokens=40, experts=6, k=2, skew=0.0):
  """bool[T,E] with k experts a token, lower numbers oftener."""
  random = np.random.default_rng(seed)
  order = np.argsort(
    random.gumbel(size=(tokens, experts)) - skew * np.arange(experts), axis=1
  )
  uses_TE = np.zeros((tokens, experts), bool)
  np.put_along_axis(uses_TE, order[:, -k:], True, axis=1)
  return uses_TE


def sets(uses_TE):
  return [frozenset(np.flatnonzero(row).tolist()) for row in uses_TE]


def test_loads_by_label_and_pairs_are_those_of_loops():
  uses_TE, label_T = drawn(0), np.random.default_rng(1).integers(-1, 3, 40)
  load_LE, pairs_EE = np.zeros((4, 6), int), np.zeros((6, 6), int)
  for label, some in zip(label_T, sets(uses_TE), strict=True):
    for e in some:
      load_LE[label, e] += label >= 0
      for other in some:
        pairs_EE[e, other] += 1
  np.testing.assert_array_equal(routes.load(label_T, uses_TE, num_labels=4), load_LE)
  np.testing.assert_array_equal(routes.pairs(uses_TE), pairs_EE)


def test_experts_of_one_label_each_tell_it_all_and_random_ones_nothing():
  label_T = np.repeat(np.arange(4), 500)
  own_TE = np.eye(4, dtype=bool)[label_T]
  bits = specialisation.mutual_information(routes.load(label_T, own_TE, num_labels=4))
  np.testing.assert_allclose(bits / math.log(2), 2.0)  # log2 of four domains
  load_LE = routes.load(label_T, drawn(3, tokens=2000, experts=8), num_labels=4)
  assert specialisation.mutual_information(load_LE) / math.log(2) < 0.01


def test_chance_is_the_mean_over_all_ways_to_shuffle_labels():
  unit_T = np.array([0, 0, 1, 2, 2, 2, 3, -1])
  uses_TE, label_U = drawn(5, tokens=8, experts=3, k=1), np.array([0, 0, 1, 1])
  every = []
  for order in itertools.permutations(range(4)):
    label_T = np.where(unit_T >= 0, label_U[list(order)][unit_T], -1)
    load_LE = routes.load(label_T, uses_TE, num_labels=2)
    every.append(float(specialisation.mutual_information(load_LE)))
  given = dict(num_labels=2, draws=600)
  found = routes.information_by_chance(unit_T, uses_TE, label_U, **given)
  assert found.shape == (600,)
  assert {round(x, 9) for x in found} == {round(x, 9) for x in every}
  deviation = np.std(every) / math.sqrt(600)
  assert abs(found.mean() - np.mean(every)) < 4 * deviation
  again = routes.information_by_chance(unit_T, uses_TE, label_U, **given)
  np.testing.assert_array_equal(again, found)


def test_documents_give_chance_more_than_their_tokens_would():
  """Each document has an expert, and no domain has one: nothing is to be told."""
  document_T, domain_D = np.repeat(np.arange(12), 50), np.arange(12) % 3
  uses_TE = np.eye(4, dtype=bool)[(document_T // 3) % 4]
  load_DE = routes.load(domain_D[document_T], uses_TE, num_labels=3)
  assert specialisation.mutual_information(load_DE) < 1e-12  # as laid out
  chance = routes.information_by_chance(
    document_T, uses_TE, domain_D, num_labels=3, draws=50
  )
  assert chance.mean() > 20 * specialisation.miller_madow(load_DE)


def test_the_lift_of_independent_choices_is_one():
  apart = 1 - np.eye(5)
  weight_E = np.array([1.0, 2, 3, 5, 7])
  pairs_EE = np.outer(weight_E, weight_E) * apart
  found = routes.lift(pairs_EE)
  np.testing.assert_allclose(found[apart > 0], 1, atol=1e-6)
  assert np.isnan(np.diag(found)).all()
  for k in (2, 3):  # drawn evenly, whatever k is
    found = routes.lift(routes.pairs(drawn(k, tokens=40_000, experts=5, k=k)))
    np.testing.assert_allclose(found[apart > 0], 1, atol=0.06)


def test_the_lift_is_against_what_has_the_same_partners():
  pairs_EE = routes.pairs(drawn(8, tokens=400, skew=0.3)).astype(float)
  np.fill_diagonal(pairs_EE, 0)
  expected_EE = np.nan_to_num(pairs_EE / routes.lift(pairs_EE))
  np.testing.assert_allclose(expected_EE.sum(1), pairs_EE.sum(1), rtol=1e-6)
  log_EE = np.log(expected_EE + np.eye(6))
  for a, b, c, d in itertools.permutations(range(6), 4):  # a product, off the diagonal
    gap = log_EE[a, b] + log_EE[c, d] - log_EE[a, d] - log_EE[c, b]
    assert abs(gap) < 1e-6


def test_experts_in_fixed_pairs_are_lifted_and_lonely_ones_have_no_lift():
  pairs_EE = routes.pairs(np.repeat([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], 9, axis=0))
  found = routes.lift(pairs_EE)
  np.testing.assert_allclose(found[0, 1], 3)  # one of three partners has all
  assert found[0, 2] == 0 and np.isnan(found[4]).all() and np.isnan(found[:, 4]).all()


def test_equal_sets_are_counted_as_by_loops_and_chance_as_by_all_shuffles():
  one_TE, other_TE = drawn(1, tokens=6, experts=4), drawn(2, tokens=6, experts=4)
  one, other = sets(one_TE), sets(other_TE)
  found = routes.stability(one_TE, other_TE)
  np.testing.assert_allclose(
    found.equal, sum(a == b for a, b in zip(one, other, strict=True)) / 6
  )
  np.testing.assert_allclose(
    found.shared, sum(len(a & b) for a, b in zip(one, other, strict=True)) / 12
  )
  equal, shared = [], []
  for dealt in itertools.permutations(other):
    equal.append(sum(a == b for a, b in zip(one, dealt, strict=True)) / 6)
    shared.append(sum(len(a & b) for a, b in zip(one, dealt, strict=True)) / 12)
  np.testing.assert_allclose(found.equal_by_chance, np.mean(equal))
  np.testing.assert_allclose(found.shared_by_chance, np.mean(shared))


def test_identical_checkpoints_share_all_and_opposite_ones_nothing():
  uses_TE = drawn(4, tokens=3000, experts=16, k=4)
  found = routes.stability(uses_TE, uses_TE.copy())
  assert found.equal == found.shared == 1
  assert found.equal_by_chance < 0.01 and abs(found.shared_by_chance - 0.25) < 0.01
  found = routes.stability([[1, 0]] * 3, [[0, 1]] * 3)
  assert found == (0, 0, 0, 0)
  found = routes.stability([[1, 0]] * 3, [[1, 0]] * 3)  # one set: no other is to be had
  assert found == (1, 1, 1, 1)


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (lambda: routes.load([0], [[1], [1]], num_labels=1), "give a label a token"),
    (lambda: routes.load([2], [[1]], num_labels=2), "label holds 2; give labels below"),
    (
      lambda: routes.information_by_chance([0], [[1]], [2], num_labels=2, draws=1),
      "label of units is from 2 to 2; give labels from 0 to num_labels - 1 = 1",
    ),
    (lambda: routes.pairs([1, 0]), r"shape \(2,\); give bool\[tokens, experts\]"),
    (lambda: routes.lift([[0, 1], [2, 0]]), "give the symmetric counts"),
    (lambda: routes.stability([[1, 0]], [[1]]), "same tokens, one or more"),
    (lambda: routes.stability(np.zeros((0, 2)), np.zeros((0, 2))), "one or more"),
  ],
)
def test_what_is_no_routing_is_refused(call, said):
  with pytest.raises(ValueError, match=said) as found:
    call()
  assert "\n" not in str(found.value)
