"""What the other routers have of their own."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import capacity, routers
from jmoe.routers.token_choice import pick
from jmoe.types import Context
from tests import _cases as cases, oracle
from tests.tolerance import assert_close

T, E = 13, 6
R = np.random.default_rng(0)
LOGITS = R.normal(size=(T, E)).astype(np.float32)
SCORES = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS)))
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def chosen(routing) -> list:
  return np.asarray(routing.expert).reshape(-1, routing.k).tolist()


def test_top_k_gives_ties_to_the_lower_expert():
  flat = jnp.zeros((2, E))
  assert chosen(routers.top_k(flat, flat, flat, k=3)) == [[0, 1, 2]] * 2
  select = jnp.array([[1.0, 2, 2, 0, 2, 1]])
  assert chosen(routers.top_k(flat[:1], flat[:1], select, k=5)) == [[1, 2, 4, 0, 5]]


def test_top_k_selects_by_one_score_and_weighs_by_another():
  def weights(scores, select):
    routing = routers.top_k(LOGITS, scores, select, k=2, scale=2.5)
    return routing.weight, routing

  select = -SCORES
  (weight, pull, routing) = jax.vjp(weights, SCORES, select, has_aux=True)
  worst = np.argsort(SCORES, axis=1, kind="stable")[:, :2]
  assert chosen(routing) == worst.tolist()
  assert_close(weight, 2.5 * np.take_along_axis(SCORES, worst, 1).reshape(-1))
  d_scores, d_select = pull(jnp.ones_like(weight))
  assert not np.any(d_select)
  np.testing.assert_array_equal(np.asarray(d_scores) != 0, np.isin(
    np.arange(T * E).reshape(T, E), worst + np.arange(T)[:, None] * E
  ))  # fmt: skip


def test_pick_is_a_gather_whose_gradient_does_not_scatter():
  ids = R.integers(-1, E + 1, (T, 3)).astype(np.int32)  # some are no expert
  found, pull = jax.vjp(lambda v: pick(v, ids), jnp.asarray(SCORES))
  inside = (ids >= 0) & (ids < E)
  expected = np.where(inside, np.take_along_axis(SCORES, ids % E, 1), 0)
  np.testing.assert_array_equal(found, expected)
  grad_TK = R.normal(size=(T, 3)).astype(np.float32)
  expected = np.zeros((T, E))
  for t, j in np.argwhere(inside):
    expected[t, ids[t, j]] += grad_TK[t, j]
  assert_close(pull(grad_TK)[0], expected)
  text = str(jax.make_jaxpr(lambda g: pull(g))(grad_TK))
  assert "scatter" not in text


def test_noisy_top_k_selects_and_weighs_by_what_it_scored():
  # So large a noise that it decides.
  routing = routers.noisy_top_k(
    jnp.asarray(LOGITS), None, None, k=2, key=KEY, train=True, noise_std=50.0
  )
  noisy = np.asarray(routing.noisy_logits)
  best = np.argsort(-noisy, axis=1, kind="stable")[:, :2]
  assert chosen(routing) == best.tolist()
  assert best.tolist() != np.argsort(-LOGITS, axis=1)[:, :2].tolist()
  assert_close(routing.probs, oracle.softmax(noisy))
  np.testing.assert_array_equal(routing.logits, LOGITS)
  quiet = routers.noisy_top_k(jnp.asarray(LOGITS), None, None, k=2, key=KEY)
  assert quiet.noisy_logits is None
  assert_close(quiet.probs, SCORES)


@pytest.mark.parametrize("group_size", [None, 5])
def test_expert_choice_counts_valid_tokens_only(group_size):
  valid = np.arange(T) % 3 > 0
  context = Context(valid=jnp.asarray(valid), group_size=group_size)
  routing = routers.expert_choice(
    LOGITS, jnp.asarray(SCORES), jnp.asarray(SCORES), context=context
  )
  S = group_size or T
  counts = [int(valid[g : g + S].sum()) for g in range(0, T, S)]
  live = np.asarray(routing.live).reshape(len(counts), E, -1)
  for g, n in enumerate(counts):
    taken = min(n, oracle.CAPACITY_RULES["ceil"](n, E, 1, 2.0))
    assert live[g].sum(-1).tolist() == [taken] * E
  assert valid[np.asarray(routing.token)[np.asarray(routing.live)]].all()


def test_expert_choice_takes_each_experts_best_first():
  routing = routers.expert_choice(
    LOGITS, jnp.asarray(SCORES), jnp.asarray(SCORES), capacity_factor=1.5
  )
  token = np.asarray(routing.token).reshape(E, -1)
  for e in range(E):
    best = np.argsort(-SCORES[:, e], kind="stable")[: token.shape[1]]
    assert token[e].tolist() == best.tolist()
  assert routing.capacity == token.shape[1] == 4


def test_expert_choice_replays_recorded_tokens():
  some = jnp.array([[[3, 1], [0, -1], [5, 6], [12, 2], [-1, -1], [4, 0]]])
  recorded = jnp.pad(some, ((0, 0), (0, 0), (0, 3)), constant_values=-1)

  def weights(scores):
    routing = routers.expert_choice(LOGITS, scores, scores, forced=recorded)
    return jnp.where(routing.live, routing.weight, 0), routing

  weight, pull, routing = jax.vjp(weights, jnp.asarray(SCORES), has_aux=True)
  ids = np.asarray(recorded).reshape(-1)
  np.testing.assert_array_equal(routing.live, ids >= 0)
  expert = np.repeat(np.arange(E), 5)
  expected = np.where(ids >= 0, SCORES[np.maximum(ids, 0), expert], 0)
  np.testing.assert_array_equal(weight, expected)
  slope = np.zeros((T, E))
  np.add.at(slope, (ids[ids >= 0], expert[ids >= 0]), 1)
  np.testing.assert_array_equal(pull(jnp.ones_like(weight))[0], slope)


def test_a_hash_table_is_even_and_balances_what_it_is_told_of():
  table = np.asarray(routers.hash_table(KEY, 50, 7))
  counts = np.bincount(table, minlength=7)
  assert counts.max() - counts.min() <= 1
  assert table.tolist() != (np.arange(50) % 7).tolist()
  other = np.asarray(routers.hash_table(jax.random.key(1), 50, 7))
  assert other.tolist() != table.tolist()
  frequency = 1000 / np.arange(1, 51)  # as of words
  table = np.asarray(routers.hash_table(KEY, 50, 7, frequency=frequency))
  load = np.bincount(table, weights=frequency, minlength=7)
  assert load.max() - load.mean() <= frequency.max()
  assert load.max() <= 1.01 * max(frequency.max(), load.mean())


def test_hashed_reads_the_table_of_its_layer_and_nothing_else():
  table_LV = jnp.asarray(R.integers(0, E, (3, 9)), jnp.int32)
  ids = jnp.asarray(R.integers(0, 9, T), jnp.int32)
  for layer in range(3):
    context = Context(token_id=ids, table=table_LV, layer=jnp.asarray(layer))
    for logits in (LOGITS, -LOGITS):
      routing = routers.hashed(logits, SCORES, SCORES, vocab_size=9, context=context)
      assert routing.expert.tolist() == table_LV[layer][ids].tolist()
      assert np.asarray(routing.weight).tolist() == [1.0] * T


def test_every_expert_has_one_entry_per_expert_in_order():
  routing = routers.every_expert(LOGITS, jnp.asarray(SCORES), SCORES)
  assert chosen(routing) == [list(range(E))] * T
  np.testing.assert_array_equal(routing.weight.reshape(T, E), SCORES)


def test_soft_routing_ignores_padding_wherever_it_is():
  G, S, C = 2, 4, 3
  logits = jnp.asarray(R.normal(size=(G, S, E, C)), jnp.float32)
  valid = jnp.array([True, False, True, True, False, False, False, False])
  whole = routers.soft(logits, context=Context(valid=valid))
  kept = jnp.asarray([0, 2, 3])
  short = routers.soft(logits[:1, kept])
  assert_close(whole.dispatch[0, kept], short.dispatch[0])
  assert_close(whole.combine[0, kept], short.combine[0])
  for array in whole.dispatch, whole.combine:
    assert not np.any(array[0, 1]) and not np.any(array[1])
    assert np.all(np.isfinite(array))


@pytest.mark.parametrize(
  "router, match",
  [
    (lambda: jmoe.use(routers.top_k, k=7), "k=7 is more than num_experts=6"),
    (lambda: jmoe.use(routers.top_k, k=0), "k=0"),
    (lambda: jmoe.use(routers.top_k, k=2, scale=0.0), "scale=0.0"),
    (lambda: jmoe.use(routers.noisy_top_k, k=2, noise_std=-1.0), "noise_std=-1.0"),
    (lambda: jmoe.use(routers.top_2, policy="randon"), "did you mean 'random'"),
    (lambda: jmoe.use(routers.top_2, threshold=0.0), "threshold=0.0"),
    (lambda: jmoe.use(routers.top_2, compare="row"), "compare='row'"),
    (
      lambda: jmoe.use(routers.expert_choice, capacity_factor=float("inf")),
      "capacity_factor=inf",
    ),
  ],
)
def test_impossible_settings_are_refused_when_configured(router, match):
  with pytest.raises(ValueError, match=match):
    jmoe.MoEConfig(cases.D, E, router=router(), experts=cases.expert(), losses=())


def test_expert_choice_uses_the_rule_it_is_given():
  config = dict(capacity_factor=1.0, rule=capacity.vmoe)
  routing = routers.expert_choice(LOGITS, SCORES, SCORES, **config)
  assert routing.capacity == 4  # 13/6 rounded up to a multiple of four
