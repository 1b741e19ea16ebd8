"""Intervals with numbers from a table of Student's distribution."""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest

from experiments import intervals


def test_the_interval_is_students():
  found = intervals.student([2.0, 4.0, 9.0])
  half = 4.3027 * np.std([2, 4, 9], ddof=1) / math.sqrt(3)  # t(0.975, 2) of a table
  assert found.mean == 5 and found.count == 3
  assert found.low == pytest.approx(5 - half, rel=1e-4)
  assert found.high == pytest.approx(5 + half, rel=1e-4)


def test_it_holds_the_true_mean_nineteen_times_of_twenty():
  random = np.random.default_rng(0)
  hits = sum(
    found.low < 1 < found.high
    for found in (intervals.student(random.normal(1, 3, size=3)) for _ in range(1000))
  )
  assert 930 < hits < 970


def test_one_value_has_no_interval_and_none_is_refused():
  assert intervals.student([3.0]) == (3.0, None, None, None, 1)
  for values in ([], [1.0, math.nan]):
    with pytest.raises(ValueError, match="give at least one, all finite"):
      intervals.student(values)


def test_ratios_are_averaged_as_logarithms():
  found = intervals.geometric([2.0, 8.0])
  assert found.mean == pytest.approx(4) and found.low < 2 and found.high > 8
  assert found.low * found.high == pytest.approx(16)
  with pytest.raises(ValueError, match="over 0"):
    intervals.geometric([1.0, 0.0])


def test_pairs_are_of_equal_seeds_and_cancel_what_a_seed_brings():
  one, other = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 0.0, 7: 3.0}
  assert intervals.paired(one, other) == (1.0, 1.0, 1.0, 0.0, 2)
  assert intervals.paired(one, {7: 3.0}) is None


def test_a_gap_is_counted_in_pooled_deviations():
  assert intervals.pooled_deviations([0.0, 2.0], [5.0, 9.0]) == pytest.approx(
    6 / math.sqrt((2 + 8) / 2)
  )
  assert intervals.pooled_deviations([1.0], [2.0, 3.0]) is None
