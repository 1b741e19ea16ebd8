"""V-MoE's load: its thresholds with and without noise."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from jmoe import MoEConfig, losses, routers, use
from tests.losses.cases import args, draw


def test_without_noise_the_threshold_is_taken_from_the_clean_logits():
  case = draw(15, 3, 2)
  quiet = losses.load(*args(case.replace(noise=None)))
  silent = losses.load(*args(case.replace(noise=np.zeros((15, 3)))))
  assert quiet == silent != losses.load(*args(case))


def test_small_noise_counts_choices():
  case = draw(15, 3, 2, noise=None, group_size=None, valid=np.ones(15, bool))
  case.chosen = np.argsort(-case.logits, axis=1)[:, :2]
  # The k-th best is its own threshold and has chance one half.
  count = np.zeros(3)
  for best, last in case.chosen:
    count[best] += 1
    count[last] += 0.5
  value = losses.load(*args(case), noise_std=1e-4)
  np.testing.assert_allclose(value, count.var() / count.mean() ** 2, rtol=1e-5)


@pytest.mark.parametrize("noise_std", [0.0, -1.0])
def test_noise_std_must_be_positive(noise_std):
  with pytest.raises(ValueError, match=f"noise_std={noise_std}"):
    losses.load(*args(draw(15, 3, 2)), noise_std=noise_std)


def test_its_noise_must_be_the_noise_that_is_drawn():
  def config(router_std, loss_std):
    return MoEConfig(
      8,
      4,
      router=use(routers.noisy_top_k, k=2, noise_std=router_std),
      losses=(use(losses.load, noise_std=loss_std),),
    )

  assert config(0.5, 0.5) == config(0.5, 0.5)
  with pytest.raises(ValueError, match="noise_std=1.0.*draws 0.5; give both the same"):
    config(0.5, 1.0)
