"""Curves whose factor is known, because one is the other at less compute."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from experiments.equal_loss import Curve, factor, flops_to_stay, smoothed

FLOPS = 1e9 * np.arange(1.0, 2001.0)


def law(flops):
  return 1.2 + 20 * flops**-0.15


@pytest.mark.parametrize("times", [0.4, 1.0, 1.7, 6.0])
def test_the_same_curve_at_a_fraction_of_the_compute_gives_that_fraction(times):
  one, other = Curve(FLOPS / times, law(FLOPS)), Curve(FLOPS, law(FLOPS))
  assert factor(one, other) == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize("times", [0.4, 1.7, 6.0])
def test_steps_of_equal_cost_give_the_factor_of_the_law(times):
  one, other = Curve(FLOPS, law(times * FLOPS)), Curve(FLOPS, law(FLOPS))
  assert factor(one, other) == pytest.approx(times, rel=1e-3)
  assert factor(other, one) == pytest.approx(1 / factor(one, other))


def test_noise_moves_the_factor_little_and_an_early_dip_not_at_all():
  random = np.random.default_rng(0)
  noisy = [law(r * FLOPS) + 0.02 * random.normal(size=len(FLOPS)) for r in (2, 1)]
  noisy[0][3] = 0.0  # a step of luck, long before the end
  one, other = (Curve(FLOPS, bits) for bits in noisy)
  assert factor(one, other) == pytest.approx(2.0, rel=0.1)


def test_skipped_steps_cost_compute_and_have_no_loss():
  bits = law(FLOPS)
  bits[100:110] = np.nan
  assert np.isfinite(smoothed(Curve(FLOPS, bits))).all()
  assert factor(Curve(FLOPS, bits), Curve(FLOPS, bits)) == pytest.approx(1.0)
  with pytest.raises(ValueError, match="without a finite loss"):
    factor(Curve(FLOPS, np.full(len(FLOPS), np.nan)), Curve(FLOPS, bits))


def test_the_window_is_the_last_tenth_of_the_compute():
  smooth = smoothed(Curve(np.arange(1.0, 101.0), np.arange(100.0)))
  assert smooth[99] == np.mean(np.arange(90, 100)) and smooth[0] == 0


def test_a_loss_that_is_not_reached_has_no_compute():
  curve = Curve(FLOPS, law(FLOPS))
  assert flops_to_stay(curve, law(FLOPS[-1])) is None
  assert flops_to_stay(curve, 100.0) == FLOPS[0]
