"""Models cut down to the experts that some text asks for."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import Context, presets, restrict, surgery
from jmoe.use import use
from tests.surgery import cases
from tests.tolerance import assert_close

SAMPLE = cases.sample()
VALID = np.asarray(SAMPLE.segment) > 0


def probs(model: surgery.Model) -> list[np.ndarray]:
  """f32[tokens,E] of each sparse layer, without padding."""
  return [layer[VALID.reshape(-1)] for layer in cases.probs(model, SAMPLE)]


def test_all_experts_are_the_same_model():
  model = cases.model(cases.config(cases.BALANCED))
  made = surgery.at_random(model, keep=cases.E, seed=0)
  assert made.model.config == model.config
  assert made.kept == [list(range(cases.E))] * 2
  chex.assert_trees_all_equal(dict(made.model.params), dict(model.params))
  chex.assert_trees_all_equal(dict(made.model.state), dict(model.state))


def test_experts_are_those_of_the_highest_mean_probability_layer_by_layer():
  model = cases.model(cases.config())
  found = surgery.layerwise(model, [SAMPLE, SAMPLE], keep=3)
  cut, kept = model, [list(range(cases.E))] * 2
  for number in range(2):
    mean_E = probs(cut)[number].astype(np.float64).mean(0)
    kept[number] = sorted(np.argsort(-mean_E)[:3].tolist())
    assert_close(
      (found.scores[number] / (2 * VALID.sum())).astype(np.float32),
      mean_E.astype(np.float32),
    )
    cut = surgery.cut_model(model, kept)
  assert found.kept == kept
  assert found.model.config == cut.config
  chex.assert_trees_all_equal(dict(found.model.params), dict(cut.params))
  # In one pass the second layer sees the whole first one.
  once = surgery.in_one_pass(model, [SAMPLE], keep=3)
  whole = probs(model)
  assert once.kept == [sorted(np.argsort(-p.mean(0))[:3].tolist()) for p in whole]
  assert once.kept[0] == found.kept[0]


def test_a_cut_model_is_the_whole_one_with_its_other_experts_masked():
  ff, kept = cases.layer(), (1, 2, 4, 5)
  model = cases.model(cases.config())
  masked = dataclasses.replace(
    ff, restrict=(use(restrict.subset, experts=kept),), rescore=True
  )
  whole = surgery.on_layers(model, lambda _, layer: layer._replace(config=masked))
  made = surgery.cut_model(model, [kept] * 2)
  shape = made.params["segments.1.0.moe.experts.up_EDF"].shape
  assert shape == (2, 4, cases.D, 5)
  assert made.params["segments.1.0.moe.shared.up_EDF"].shape[1] == 1
  found, expected = (cases.logits(m, SAMPLE)[VALID] for m in (made, whole))
  assert_close(found, expected)
  # What was masked is cut from the rule that masked it.
  again = surgery.cut_model(whole, [kept] * 2)
  assert surgery.layers(again)[0].config.restrict == ()


def test_biases_of_selection_go_with_their_experts():
  model = cases.model(cases.config(cases.BALANCED))
  made = surgery.cut_model(model, [(0, 3), (1, 2)])
  for old, new, kept in zip(
    surgery.layers(model), surgery.layers(made), ([0, 3], [1, 2]), strict=True
  ):
    np.testing.assert_array_equal(new.state.bias, old.state.bias[kept])


def test_arrays_on_devices_are_cut_there():
  model = cases.model(cases.config(cases.BALANCED))
  there = model._replace(
    **jax.tree.map(jnp.asarray, model._asdict() | {"config": None})
  )
  there = there._replace(config=model.config)
  found, expected = (surgery.cut_model(m, [[0, 3], [1]]) for m in (there, model))
  assert all(isinstance(x, jax.Array) for x in found.params.values())
  chex.assert_trees_all_equal(dict(found.params), dict(expected.params))
  chex.assert_trees_all_equal(dict(found.state), dict(expected.state))


def test_layers_may_keep_different_numbers():
  model = cases.model(cases.config())
  found = surgery.at_random(model, keep=[1, 99], seed=3)
  assert [len(kept) for kept in found.kept] == [1, cases.E]
  first, second = surgery.layers(found.model)
  assert (first.config.num_experts, first.config.k) == (1, 1)
  assert second.config == surgery.layers(model)[1].config
  assert np.isfinite(cases.logits(found.model, SAMPLE)).all()
  assert surgery.at_random(model, keep=[1, 99], seed=3).kept == found.kept
  drawn = {tuple(surgery.at_random(model, keep=3, seed=n).kept[0]) for n in range(9)}
  assert len(drawn) > 5


def test_pools_of_documents_shrink_with_the_experts():
  ff = presets.emo.layer(d_model=cases.D, d_ff=5, num_experts=6, k=2, most=5)
  layer = surgery.Layer(ff, jmoe.moe_init(jax.random.key(0), ff))
  for size, least, most in ((4, 3, 4), (2, 2, 2), (1, 1, 1)):
    (pool,) = surgery.cut(layer, range(size)).config.restrict
    assert (pool.get("least"), pool.get("most")) == (least, most)


def test_easy_ep_is_its_formula():
  model = cases.model(cases.config())
  _, scores = surgery.walk(model, [SAMPLE], surgery.easy_ep)
  seen = {}

  def record(one):  # what the first sparse layer sees, on the host
    jax.debug.callback(
      lambda x, y: seen.setdefault("first", (x, y)), one.x_TD, one.y_TD, ordered=True
    )
    return jnp.zeros(())

  surgery.walk(model, [SAMPLE], record)
  x_TD, y_TD = (np.asarray(a, np.float64) for a in seen["first"])
  layer = surgery.layers(model)[0]
  gate_DE = np.asarray(layer.params["gate"]["kernel_DE"], np.float64)
  own = {n: np.asarray(a, np.float64) for n, a in layer.params["experts"].items()}
  expected_E = np.zeros(cases.E)
  for t in np.flatnonzero(VALID.reshape(-1)):
    p_E = np.exp(x_TD[t] @ gate_DE)
    p_E /= p_E.sum()
    after_D = x_TD[t] + y_TD[t]
    size = np.linalg.norm(x_TD[t]) * np.linalg.norm(after_D)
    for e in np.argsort(-p_E)[: cases.K]:
      hidden = x_TD[t] @ own["gate_EDF"][e]
      hidden = hidden / (1 + np.exp(-hidden)) * (x_TD[t] @ own["up_EDF"][e])
      turn = 1 - x_TD[t] @ after_D / size
      expected_E[e] += p_E[e] * np.linalg.norm(hidden @ own["down_EFD"][e]) * turn
  assert_close(scores[0].astype(np.float32), expected_E.astype(np.float32))


def test_a_domains_model_gives_its_outputs_to_the_bit():
  config = presets.pangu_sigma.layer(
    d_model=cases.D, d_ff=5, vocab_size=cases.V, num_domains=3, num_experts=6
  )
  key = jax.random.key(0)
  params = jmoe.moe_init(key, config)
  layer = surgery.Layer(config, params, jmoe.layer.init_state(config, params, key))
  x = jax.random.normal(key, (9, cases.D))
  ids = jnp.arange(9, dtype=jnp.int32)
  for number in range(3):
    own = surgery.cut(layer, surgery.of_domain(layer, number))
    assert own.config.restrict == () and own.config.num_experts == 2
    domain = jnp.full(9, number, jnp.int32)
    y, _ = jmoe.moe(
      params, x, config, state=layer.state,
      context=Context(token_id=ids, domain_id=domain),
    )  # fmt: skip
    alone, info = jmoe.moe(
      own.params, x, own.config, state=own.state, context=Context(token_id=ids)
    )
    np.testing.assert_array_equal(alone, y)
    assert int(info.load.sum()) == 9
  with pytest.raises(ValueError, match="not those of one domain"):
    surgery.cut(layer, [0, 2])
  with pytest.raises(ValueError, match="number=3 of 3 domains"):
    surgery.of_domain(layer, 3)


@pytest.mark.parametrize(
  "call, match",
  [
    (lambda m: surgery.layerwise(m, [], keep=2), "samples"),
    (lambda m: surgery.at_random(m, keep=[2], seed=0), "holds 1 numbers"),
    (lambda m: surgery.at_random(m, keep=0, seed=0), "keep 1 expert or more"),
    (lambda m: surgery.at_random(m, keep=2.5, seed=0), "keep=2.5 of 2"),
    (lambda m: surgery.at_random(m, keep=[2.0, 1], seed=0), "keep 1 expert or more"),
    (lambda m: surgery.cut_model(m, [[0, 6]] * 2), "in 0..5"),
    (lambda m: surgery.cut_model(m, [[1, 1]] * 2), "distinct"),
    (lambda m: surgery.of_domain(surgery.layers(m)[0], 0), "no restrict.domain"),
  ],
)
def test_what_cannot_be_cut_is_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call(cases.model(cases.config()))


def test_a_rule_that_does_not_say_what_is_left_is_refused():
  groups = use(restrict.expert_groups, num_groups=3, keep=2)
  layer = surgery.Layer(cases.layer(restrict=(groups,)), {})
  with pytest.raises(ValueError, match="does not say what is left"):
    surgery.cut(layer, [0, 1, 2])
