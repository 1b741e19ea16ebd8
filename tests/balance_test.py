"""The balance bias moves towards equal loads, and only then."""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import balance
from tests import oracle, tolerance


@pytest.mark.parametrize("rate", [1e-3, 0.25])
def test_equals_the_definition(rate):
  r = np.random.default_rng(0)
  for E in 1, 3, 8:
    bias, load = r.normal(size=E), r.integers(0, 9, E)
    actual = balance.update(
      jnp.asarray(bias, jnp.float32), jnp.asarray(load), rate=rate
    )
    assert actual.dtype == jnp.float32
    expected = oracle.bias_update(bias, load, rate).astype(np.float32)
    tolerance.assert_close(actual, expected)


def test_stacked_layers_are_apart():
  load_LE = jnp.array([[4, 0], [50, 60]])
  bias_LE = balance.update(jnp.zeros((2, 2)), load_LE, rate=1.0)
  assert bias_LE.tolist() == [[-1, 1], [1, -1]]


@pytest.mark.parametrize("load", [0, 7, 123_456_789, 2**31 - 1])
def test_equal_loads_move_nothing(load):
  bias = jnp.array([0.5, -0.5, 0.0])
  load_E = jnp.full(3, load, jnp.int32)
  assert balance.update(bias, load_E).tolist() == bias.tolist()


def test_updates_balance_a_skewed_selection():
  scores_E, bias_E = np.array([0.9, 0.5, 0.1]), jnp.zeros(3)
  jitter_TE = np.random.default_rng(0).uniform(0, 0.6, (300, 3))
  for _ in range(200):
    chosen = np.argmax(scores_E + jitter_TE + np.asarray(bias_E), axis=1)
    load_E = jnp.asarray(np.bincount(chosen, minlength=3), jnp.int32)
    bias_E = balance.update(bias_E, load_E, rate=0.01)
  assert load_E.min() > 80
