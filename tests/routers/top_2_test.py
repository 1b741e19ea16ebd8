"""The second expert: how often it is used, and whose slot it takes."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import routers
from jmoe.types import Context
from tests import _cases as cases

T = 20_000
LOGITS = jnp.tile(jnp.array([1.0, 2.0, -0.5, 0.3]), (T, 1))
SCORES = jax.nn.softmax(LOGITS)
G1, G2 = sorted(np.asarray(SCORES[0]).tolist(), reverse=True)[:2]
KEY = jax.random.key(3)


def route(train=True, key=KEY, **keywords):
  return routers.top_2(LOGITS, SCORES, SCORES, key=key, train=train, **keywords)


@pytest.mark.parametrize(
  "keywords, g2",
  [
    (dict(threshold=0.5), G2 / (G1 + G2)),
    (dict(threshold=0.9), G2 / (G1 + G2)),
    (dict(threshold=0.5, compare="raw"), G2),
    (dict(threshold=0.1), 1.0),  # always: the chance is cut at one
  ],
)
def test_a_random_second_expert_is_used_as_often_as_its_weight_says(keywords, g2):
  live = np.asarray(route(policy="random", **keywords).live).reshape(T, 2)
  assert live[:, 0].all()
  chance = min(1.0, g2 / keywords["threshold"])
  bound = 4 * np.sqrt(chance * (1 - chance) / T)
  assert abs(live[:, 1].mean() - chance) <= bound


def test_a_sampled_second_expert_follows_the_softmax_of_the_others():
  routing = route(policy="sampling")
  expert = np.asarray(routing.expert).reshape(T, 2)
  assert (expert[:, 0] == 1).all() and np.asarray(routing.live).all()
  counts = np.bincount(expert[:, 1], minlength=4) / T
  chance = np.asarray(jax.nn.softmax(LOGITS[0].at[1].set(-jnp.inf)))
  assert counts[1] == 0
  assert np.all(np.abs(counts - chance) <= 4 * np.sqrt(chance * (1 - chance) / T))


def test_evaluation_has_a_policy_of_its_own_and_needs_no_key():
  every = route(train=False, key=None, policy="random").live
  assert np.asarray(every).all()
  none = route(train=False, key=None, policy="all", eval_policy="none").live
  assert np.asarray(none).reshape(T, 2).any(0).tolist() == [True, False]
  with pytest.raises(ValueError, match="random numbers; pass key"):
    route(key=None, policy="random")
  config = cases.config_of(
    dict(router="top_2 sampling", capacity="dropless", dispatch="sort"), 4
  )
  x = jnp.zeros((5, cases.D))
  with pytest.raises(ValueError, match="top_2.*pass key"):
    jmoe.moe(cases.params_of(config), x, config, train=True)


def test_draws_follow_a_token_to_another_place():
  turn = np.random.default_rng(0).permutation(200)
  moved = Context(position=jnp.asarray(turn, jnp.int32))
  for policy in ("random", "sampling"):
    rows = [
      routers.top_2(
        LOGITS[:200], SCORES[:200], SCORES[:200], key=KEY, train=True, policy=policy,
        context=context,
      )
      for context in (Context(), moved)
    ]  # fmt: skip
    for name in ("live", "expert"):
      here, there = (np.asarray(getattr(r, name)).reshape(200, 2) for r in rows)
      np.testing.assert_array_equal(here[turn], there)


def test_no_gradient_flows_through_the_comparison():
  def total(logits):
    scores = jax.nn.softmax(logits)
    routing = routers.top_2(
      logits, scores, scores, key=KEY, train=True, policy="threshold", threshold=0.3
    )
    return jnp.sum(routing.live.astype(jnp.float32)), routing

  slope, _ = jax.grad(total, has_aux=True)(LOGITS[:4])
  assert not np.any(slope)
