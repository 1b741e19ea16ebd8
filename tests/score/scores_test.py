"""What the scores have of their own."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import score
from tests import _cases as cases, oracle, tolerance

LOGITS = np.random.default_rng(0).normal(size=(5, 4)) * 3


@pytest.mark.parametrize("name", oracle.SCORES)
def test_slopes_equal_central_differences(name):
  weights = np.arange(1.0, 21.0).reshape(5, 4)
  with cases.enable_x64():
    function = getattr(score, name)
    found = jax.grad(lambda x: jnp.sum(function(x) * weights))(jnp.asarray(LOGITS))
  expected = oracle.finite_difference(
    lambda x: np.sum(oracle.SCORES[name](x) * weights), LOGITS
  )
  np.testing.assert_allclose(found, expected, **tolerance.FINITE_DIFFERENCE)


def test_softmax_of_a_row_sums_to_one_whatever_its_size():
  for size in (1e-30, 1.0, 1e4, 1e30):
    total = jnp.sum(score.softmax(size * jnp.asarray(LOGITS, jnp.float32)), axis=1)
    tolerance.assert_close(total, np.ones(5))


def test_relu_switches_experts_off_with_their_gradient():
  logits = jnp.array([[-2.0, 0.0, 3.0]])
  found, pull = jax.vjp(score.relu, logits)
  assert found.tolist() == [[0, 0, 3]]
  assert pull(jnp.ones_like(found))[0].tolist() == [[0, 0, 1]]


def test_sqrt_softplus_has_a_finite_slope_where_its_root_has_none():
  slope = jax.vmap(jax.grad(lambda x: score.sqrt_softplus(x)))(
    jnp.array([-1e4, -300.0, -200.0, -60.0, 0.0, 1e4])
  )
  assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope) >= 0)
  assert slope[0] == 0 and slope[4] > 0.1
