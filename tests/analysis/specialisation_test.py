"""Numbers of domain x expert maps: loops over counts, and the two ideal maps."""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest

from jmoe.analysis import specialisation as spec

pytestmark = pytest.mark.contract

EVEN = np.full((4, 8), 6)
PERFECT = np.kron(np.eye(4, dtype=int), [[3, 3]])  # two experts for each domain


def some_map(seed, zeros=0.0) -> np.ndarray:
  random = np.random.default_rng(seed)
  load_DE = random.integers(0, 50, (3, 5))
  return np.where(random.random((3, 5)) < zeros, 0, load_DE)


def entropy(counts) -> float:
  total = sum(counts)
  return -sum(c / total * math.log(c / total) for c in counts if c)


def information(load_DE) -> float:
  total, found = load_DE.sum(), 0.0
  for d in range(load_DE.shape[0]):
    for e in range(load_DE.shape[1]):
      if load_DE[d, e]:
        p_d, p_e = load_DE[d].sum() / total, load_DE[:, e].sum() / total
        found += load_DE[d, e] / total * math.log(load_DE[d, e] / total / (p_d * p_e))
  return found


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_information_is_that_of_a_loop_over_counts(zeros):
  for seed in range(4):
    load_DE = some_map(seed, zeros)
    found = spec.mutual_information(load_DE)
    np.testing.assert_allclose(found, information(load_DE), atol=1e-12)
    domains = entropy(load_DE.sum(1))
    np.testing.assert_allclose(
      spec.normalised_mutual_information(load_DE), found / domains, atol=1e-12
    )


def test_domains_that_use_experts_alike_tell_nothing():
  assert spec.mutual_information(EVEN) == spec.normalised_mutual_information(EVEN) == 0
  uneven_DE = np.outer([1, 5, 2, 9], [3, 0, 1, 7])  # independent, not uniform
  assert spec.mutual_information(uneven_DE) < 1e-12
  np.testing.assert_allclose(spec.similarity(uneven_DE), np.ones((4, 4)))


def test_domains_that_share_no_expert_tell_all():
  np.testing.assert_allclose(spec.mutual_information(PERFECT), math.log(4))
  np.testing.assert_allclose(spec.normalised_mutual_information(PERFECT), 1)
  np.testing.assert_array_equal(spec.similarity(PERFECT), np.eye(4))
  # Tokens of one domain say nothing of domains, so there is nothing to be told.
  assert spec.normalised_mutual_information([[3, 4]]) == 0


def test_chance_adds_what_miller_and_madow_say():
  load_DE = some_map(2)
  load_DE[1] = load_DE[:, 3] = 0  # neither can be told, nor tell
  bias = (3 - 1 - 1) * (5 - 1 - 1) / (2 * load_DE.sum())
  np.testing.assert_allclose(spec.miller_madow(load_DE), bias)
  assert spec.miller_madow([[0, 0], [0, 0]]) == spec.miller_madow([[3, 4]]) == 0
  # Of independent choices the mean is the bias, as the truth is zero.
  random = np.random.default_rng(0)
  flat = random.multinomial(500, np.full(15, 1 / 15), size=400).reshape(-1, 3, 5)
  found = spec.mutual_information(flat).mean()
  np.testing.assert_allclose(found, spec.miller_madow(flat).mean(), rtol=0.1)


def test_the_cosine_is_that_of_loops():
  load_DE = some_map(7, zeros=0.3)
  load_DE[1] = 0
  found = spec.cosine(load_DE)
  for a, one in enumerate(load_DE.tolist()):
    for b, other in enumerate(load_DE.tolist()):
      dot = sum(x * y for x, y in zip(one, other, strict=True))
      size = math.hypot(*one) * math.hypot(*other)
      np.testing.assert_allclose(found[a, b], dot / size if size else 0, atol=1e-12)
  np.testing.assert_allclose(spec.cosine(np.outer([1, 5], [3, 0, 7])), np.ones((2, 2)))
  np.testing.assert_array_equal(spec.cosine(PERFECT), np.eye(4))


def test_shares_and_similarity_are_those_of_loops():
  load_DE = some_map(7, zeros=0.3)
  load_DE[1] = 0  # a domain without tokens
  share_DE = spec.domain_shares(load_DE)
  for d, row_E in enumerate(load_DE.tolist()):
    for e, count in enumerate(row_E):
      assert share_DE[d, e] == (count / sum(row_E) if sum(row_E) else 0)
  for a in range(3):
    for b in range(3):
      both = sum(min(x, y) for x, y in zip(share_DE[a], share_DE[b], strict=True))
      np.testing.assert_allclose(spec.similarity(load_DE)[a, b], both)
  np.testing.assert_allclose(np.diag(spec.similarity(load_DE)), [1, 0, 1])


def test_load_is_even_or_one_experts():
  even_E, one_E = EVEN.sum(0), np.array([0, 0, 9, 0])
  assert spec.skew(even_E) == 1 and spec.skew(one_E) == 4
  np.testing.assert_allclose(spec.load_entropy(even_E), math.log(8))
  assert spec.load_entropy(one_E) == 0
  assert not spec.dead_experts(even_E).any()
  np.testing.assert_array_equal(spec.dead_experts(one_E), one_E == 0)
  assert spec.skew([0, 0]) == 1 and spec.load_entropy([0, 0]) == 0


def test_load_numbers_are_those_of_loops():
  load_E = some_map(3).sum(0)
  np.testing.assert_allclose(spec.load_entropy(load_E), entropy(load_E.tolist()))
  assert spec.skew(load_E) == max(load_E) * 5 / sum(load_E)


def test_an_expert_is_dead_below_the_stated_fraction_of_even():
  load_E = np.array([100, 55, 40, 5])  # even is 50
  assert spec.dead_experts(load_E, below=0.1).tolist() == [False] * 4  # 5 is not below
  assert spec.dead_experts(load_E, below=0.11).tolist() == [False, False, False, True]
  assert spec.dead_experts(load_E, below=1.0).tolist() == [False, False, True, True]


def test_layers_are_kept_apart():
  maps = np.stack([some_map(n, zeros=0.2) for n in range(4)])
  for function in (
    spec.mutual_information,
    spec.normalised_mutual_information,
    spec.domain_shares,
    spec.similarity,
    spec.cosine,
    spec.miller_madow,
  ):
    np.testing.assert_allclose(function(maps), [function(m) for m in maps], atol=1e-12)
  for function in (spec.skew, spec.load_entropy, spec.dead_experts):
    np.testing.assert_allclose(function(maps[:, 0]), [function(m[0]) for m in maps])


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (lambda: spec.mutual_information([1, 2]), r"shape \(2,\).*\[domains, experts\]"),
    (lambda: spec.domain_shares([[1, -2]]), "give numbers >= 0"),
    (lambda: spec.skew([1.0, math.nan]), "give numbers >= 0"),
    (lambda: spec.load_entropy([]), r"shape \(0,\).*\[experts\]"),
    (lambda: spec.dead_experts([1, 2], below=3), "below=3; give a fraction"),
  ],
)
def test_what_is_no_map_of_counts_is_refused(call, said):
  with pytest.raises(ValueError, match=said) as found:
    call()
  assert "\n" not in str(found.value)
