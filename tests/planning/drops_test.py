"""Planned drops are those of the library's own queues, on average."""
# SPDX-License-Identifier: Apache-2.0

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.planning import drops
from jmoe import capacity, routers
from jmoe.assign import assign
from jmoe.types import Context
from jmoe.use import use

T, E, K, FACTOR, TRIALS = 96, 8, 2, 1.25, 300


def by_enumeration(weights, k):
  """Chances to be among the first k, summed over every order of drawing."""
  chance = np.zeros(len(weights))
  for drawn in itertools.permutations(range(len(weights)), k):
    probability, left = 1.0, sum(weights)
    for expert in drawn:
      probability *= weights[expert] / left
      left -= weights[expert]
    chance[list(drawn)] += probability
  return chance


@pytest.mark.parametrize("k", [1, 2, 3])
def test_chances_are_those_of_drawing_without_replacement(k):
  weights = np.array([0.1, 1.0, 2.0, 7.0])
  np.testing.assert_allclose(
    drops.chosen(weights, k), by_enumeration(weights, k), rtol=1e-3
  )


def by_summing(tokens, chance, slots):
  """The mean overflow from every load's probability, one at a time."""
  load, total = (1 - chance) ** tokens, 0.0  # probability of a load of zero
  for n in range(1, tokens + 1):
    load *= (tokens - n + 1) / n * chance / (1 - chance)
    total += max(n - slots, 0) * load
  return total


@pytest.mark.parametrize("slots", [0, 3, 10, 40])
def test_overflow_is_the_sum_over_loads(slots):
  chance = np.array([0.01, 0.2, 0.5])
  expected = [by_summing(40, c, slots) for c in chance]
  np.testing.assert_allclose(drops.overflow(40, chance, slots), expected, atol=1e-9)


@pytest.mark.parametrize("skew", [0.0, 0.5])
def test_drops_are_those_of_simulated_routings(skew):
  """Within four standard errors of 300 batches through `routers` and `assign`."""
  chance_E = drops.popularity(E, K, skew)
  z_E = np.zeros(E) if not skew else skew * _shuffled_quantiles()
  limit = use(capacity.by_factor, factor=FACTOR)

  def one(key):
    logits = jnp.asarray(z_E, jnp.float32) + jax.random.gumbel(key, (T, E))
    scores = jax.nn.softmax(logits)
    routing = routers.top_k(scores, scores, scores, k=K, context=Context())
    plan = assign(routing, Context(), capacity=limit)
    return 1 - jnp.mean(plan.kept), plan.load[0]

  dropped, load_E = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), TRIALS))
  slots = capacity.by_factor(T, E, K, factor=FACTOR)
  expected = drops.dropped(T, chance_E, int(slots))
  error = np.std(dropped) / TRIALS**0.5
  assert abs(np.mean(dropped) - expected) < 4 * error
  error_E = np.sqrt(chance_E / (T * TRIALS))
  assert (np.abs(np.mean(load_E, 0) / T - chance_E) < 4 * error_E).all()


def _shuffled_quantiles():
  from statistics import NormalDist

  z_E = [NormalDist().inv_cdf((n + 0.5) / E) for n in range(E)]
  return np.random.default_rng(0).permutation(z_E)


def test_a_token_has_experts_on_as_many_devices_as_simulated():
  chance_E, rng = drops.popularity(32, 4, 0.0), np.random.default_rng(1)
  chosen = rng.random((20000, 32)).argpartition(4, axis=1)[:, :4]
  seen = np.mean([len(set(row // 8)) for row in chosen])
  assert abs(drops.distinct(chance_E, 4) / seen - 1) < 0.01
