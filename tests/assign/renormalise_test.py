"""Weights that sum to something, and what a missing choice does to the others."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import capacity, renormalise, routers, score
from jmoe.assign import assign
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases, oracle
from tests.tolerance import assert_close

T, E, K = 11, 5, 3
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def planned(logits, score_name="softmax", slots=None, scale=1.0):
  scores = getattr(score, score_name)(logits)
  routing = routers.top_k(logits, scores, scores, k=K, scale=scale)
  member = None if slots is None else use(capacity.fixed, slots=slots)
  return assign(routing, Context(), capacity=member)


def weights(plan, name):
  found = getattr(renormalise, name)(plan).routing.weight
  return jnp.where(plan.kept, found, 0).reshape(T, -1)


def test_softmax_over_the_chosen_is_dividing_a_softmax_by_their_sum():
  plan = planned(jnp.asarray(LOGITS), scale=2.5)
  assert_close(weights(plan, "over_chosen"), weights(plan, "before_dropping"))
  assert_close(jnp.sum(weights(plan, "over_chosen"), 1), np.full(T, 2.5))


def test_a_dropped_choice_loses_its_share_before_and_gives_it_away_after():
  plan = planned(jnp.asarray(LOGITS), slots=4)
  kept = np.asarray(plan.kept).reshape(T, K)
  full, some, none = kept.all(1), kept.any(1) & ~kept.all(1), ~kept.any(1)
  assert some.any()
  before = np.asarray(weights(plan, "before_dropping")).sum(1)
  after = np.asarray(weights(plan, "after_dropping")).sum(1)
  assert_close(before[full], np.ones(full.sum()))
  assert (before[some] < 0.99).all()
  assert_close(after[~none], np.ones((~none).sum()))
  assert not after[none].any()


def test_a_skipped_second_choice_takes_its_share_along():
  # GShard divides by both before it skips one of them.
  logits = jnp.asarray(LOGITS)
  scores = jax.nn.softmax(logits)
  routing = routers.top_2(logits, scores, scores, train=True, policy="none")
  plan = assign(routing, Context())
  entries = oracle.top_2(np.asarray(scores), "none", weigh="pair")
  expected = [e.weight if e.live else 0 for e in entries]
  found = weights(plan, "before_dropping").reshape(-1)
  assert_close(found, np.array(expected))
  assert_close(weights(plan, "after_dropping")[:, 0], np.ones(T))


@pytest.mark.parametrize("name", ["before_dropping", "after_dropping", "over_chosen"])
@pytest.mark.parametrize("score_name", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [0.0, -30.0, -60.0])
def test_gradients_are_exact_for_weights_of_any_size(name, score_name, shift):
  # A sigmoid at -60 is 1e-26: its square is no float32.
  slots = None if name == "before_dropping" else 4
  into = np.cos(np.arange(T * K)).reshape(T, K)

  def total(logits):
    plan = planned(logits, score_name, slots)
    return jnp.sum(weights(plan, name) * into.astype(logits.dtype))

  found = jax.grad(total)(jnp.asarray(LOGITS + np.float32(shift)))
  with cases.enable_x64():
    logits = (LOGITS + np.float32(shift)).astype(np.float64)
    expected = jax.grad(total)(jnp.asarray(logits))
  assert np.abs(expected).max() > 1e-2
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", oracle.RENORMALISE)
@pytest.mark.parametrize("score_name", oracle.SCORES)
def test_gradients_are_finite_whatever_the_logits(name, score_name):
  signs = np.sign(LOGITS).astype(np.float32)
  for size in (1e-30, 100.0, 200.0, 1e4):

    def total(logits):
      plan = planned(logits, score_name, 4)
      return jnp.sum(weights(plan, name) * jnp.arange(1.0, K + 1))

    for logits in (size * signs, np.full_like(signs, -size), 0 * signs):
      value, slope = jax.value_and_grad(total)(jnp.asarray(logits))
      assert np.isfinite(value) and np.all(np.isfinite(slope)), (size, value)
