"""Groups of hidden units: equal sizes, the dense model of all, and back to it."""
# SPDX-License-Identifier: Apache-2.0

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import surgery
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models.by_name import take_apart
from jmoe.surgery import cluster as clustering
from tests.surgery import cases
from tests.tolerance import assert_close

SAMPLE = cases.sample()
VALID = np.asarray(SAMPLE.segment) > 0


def model(gated):
  ff = Dense(12, gated=gated, activation=jax.nn.silu if gated else jax.nn.gelu)
  block = BlockConfig(Attention(num_heads=2), ff)
  return cases.model(ModelConfig(cases.V, cases.D, (((block,), 2),), remat=False))


def test_clusters_are_of_one_size_the_same_again_and_find_what_is_there():
  random = np.random.default_rng(0)
  centre = random.normal(size=(4, 16))
  true = np.repeat(np.arange(4), 9)
  random.shuffle(true)
  scale = np.exp(random.normal(size=(36, 1)))  # lengths must not matter
  keys = scale * (centre[true] + 0.3 * random.normal(size=(36, 16)))
  label = clustering.balanced(keys, 4)
  np.testing.assert_array_equal(np.bincount(label), [9] * 4)
  np.testing.assert_array_equal(label, clustering.balanced(keys, 4))
  for n in range(4):
    assert len(set(true[label == n])) == 1
  # Nothing to find: still equal sizes, and nearer to their means than at random.
  noise = random.normal(size=(60, 5))
  label = clustering.balanced(noise, 6)
  np.testing.assert_array_equal(np.bincount(label), [10] * 6)
  unit = noise / np.linalg.norm(noise, axis=1, keepdims=True)

  def together(label):
    return sum(np.linalg.norm(unit[label == n].sum(0)) for n in range(6))

  assert together(label) > 1.3 * together(np.arange(60) % 6)


@pytest.mark.parametrize("gated", [True, False])
def test_all_groups_are_the_dense_model_and_merge_to_its_bits(gated):
  parent = model(gated)
  made = clustering.cluster(parent, num_experts=3, k=3, blocks_changed=[1])
  (layer,) = surgery.layers(made.model)
  assert_close(
    cases.logits(made.model, SAMPLE)[VALID], cases.logits(parent, SAMPLE)[VALID]
  )
  back = clustering.merged(made)
  assert back.config == parent.config
  chex.assert_trees_all_equal(dict(back.params), dict(parent.params))
  keys = layer.params["experts"]["gate_EDF" if gated else "up_EDF"]
  assert_close(layer.state.gate["key_ED"], np.mean(keys, axis=2))


def test_a_token_goes_through_its_groups_alone_at_weight_one():
  made = clustering.cluster(model(True), num_experts=4, k=2, blocks_changed=[0])
  (layer,) = surgery.layers(made.model)
  x = np.random.default_rng(1).normal(size=(7, cases.D)).astype(np.float32)
  y, _ = jmoe.moe(layer.params, jnp.asarray(x), layer.config, state=layer.state)
  old = {n: np.asarray(p, np.float64) for n, p in layer.params["experts"].items()}
  score = x @ old["gate_EDF"].mean(2).T
  for t, token in enumerate(x):
    expected = 0.0
    for e in np.argsort(-score[t])[:2]:
      pre = token @ old["gate_EDF"][e]
      hidden = pre / (1 + np.exp(-pre)) * (token @ old["up_EDF"][e])
      expected = expected + hidden @ old["down_EFD"][e]
    assert_close(y[t], np.asarray(expected, np.float32))


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_a_trained_gate_begins_at_the_means_and_multiplies(gate):
  made = clustering.cluster(
    model(False), num_experts=4, k=2, blocks_changed=[0], gate=gate
  )
  (layer,) = surgery.layers(made.model)
  x = np.random.default_rng(1).normal(size=(7, cases.D)).astype(np.float32)
  y, info = jmoe.moe(layer.params, jnp.asarray(x), layer.config, with_plan=True)
  assert "load_balance" in info.losses
  old = {n: np.asarray(p, np.float64) for n, p in layer.params["experts"].items()}
  centre = old["up_EDF"].mean(2).T
  score = x @ centre
  if gate == "cosine":
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(centre, axis=0)
    score = 2 * score / lengths
  for t, token in enumerate(x):
    best = np.argsort(-score[t])[:2]
    weight = np.exp(score[t][best]) / np.exp(score[t][best]).sum() * 2
    expected = sum(
      w * (np.asarray(jax.nn.gelu(token @ old["up_EDF"][e])) @ old["down_EFD"][e])
      for w, e in zip(weight, best, strict=True)
    )
    assert_close(y[t], np.asarray(expected, np.float32))


def test_means_follow_the_keys_after_a_step_or_stay():
  """In a stack of two layers, through the update that training loops call."""
  for gate, follows in (("keys", True), ("frozen", False)):
    made = clustering.cluster(
      model(True), num_experts=3, k=2, blocks_changed=[0, 1], gate=gate
    )
    module = made.model.module()
    _, infos = module(SAMPLE.inputs)
    blueprint, params, state = take_apart(module)
    (name,) = (n for n in params if n.endswith("gate_EDF"))
    moved = params | {name: 2 * params[name]}
    after = blueprint.balanced(moved, state, infos)
    (buffer,) = after.values()
    (before,) = state.values()
    assert_close(buffer, before * (2 if follows else 1))
    assert_close(before, params[name].mean(-1))


def test_a_feed_forward_with_biases_goes_there_and_back_to_the_bit():
  random = np.random.default_rng(0)
  matrices = {
    "up": random.normal(size=(6, 12)).astype(np.float32),
    "down": random.normal(size=(12, 6)).astype(np.float32),
    "up_bias": random.normal(size=12).astype(np.float32),
  }
  layer, order = clustering.split(matrices, num_experts=4, k=4, activation=jnp.tanh)
  chex.assert_trees_all_equal(clustering.joined(layer, order), matrices)
  x = random.normal(size=(5, 6)).astype(np.float32)
  y, _ = jmoe.moe(layer.params, jnp.asarray(x), layer.config, state=layer.state)
  hidden = np.tanh(x @ matrices["up"] + matrices["up_bias"])
  assert_close(y, hidden @ matrices["down"])


def test_mistakes_are_named():
  for fields, message in (
    (dict(num_experts=5), "does not divide d_ff=12"),
    (dict(blocks_changed=[2]), "dense blocks of the 2"),
    (dict(partition="values"), "partition='values'"),
    (dict(gate="mlp"), "gate='mlp'; give one of keys, frozen"),
  ):
    given: dict = dict(num_experts=3, k=2, blocks_changed=[1]) | fields
    with pytest.raises(ValueError, match=message):
      clustering.cluster(model(True), **given)
  with pytest.raises(ValueError, match="num_experts=5 does not divide d_ff=12"):
    clustering.stacked({"up": np.zeros((6, 12))}, np.arange(12), 5)
  with pytest.raises(ValueError, match=r"matrices=\['down'\]; give up and down"):
    clustering.split({"down": np.zeros((12, 6))}, num_experts=3, k=2, activation=abs)
