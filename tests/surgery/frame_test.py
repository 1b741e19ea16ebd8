"""Models taken apart and put together again, and what a receipt says."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jmoe import surgery
from jmoe.surgery import frame
from tests.surgery import cases


def test_a_model_is_the_sum_of_its_blocks():
  model = cases.model(cases.config(cases.BALANCED))
  parts = surgery.blocks(model)
  assert [part.sparse for part in parts] == [False, True, True]
  again = surgery.rebuilt(model, parts)
  assert again.config == model.config
  chex.assert_trees_all_equal(dict(again.params), dict(model.params))
  chex.assert_trees_all_equal(dict(again.state), dict(model.state))
  layers = surgery.layers(model)
  for n, layer in enumerate(layers):
    name = "segments.1.0.moe.gate.kernel_DE"
    np.testing.assert_array_equal(
      layer.params["gate"]["kernel_DE"], model.params[name][n]
    )
    np.testing.assert_array_equal(
      layer.state.bias, model.state["segments.1.0.moe.state.bias"][n]
    )
    same = parts[1 + n].with_layer(layer)
    chex.assert_trees_all_equal(dict(same.params), dict(parts[1 + n].params))
    chex.assert_trees_all_equal(dict(same.state), dict(parts[1 + n].state))


def test_layers_that_come_to_differ_leave_their_stack():
  model = cases.model(cases.config(cases.BALANCED, repeat=3))

  def change(number, layer):
    rate = 0.5 if number == 2 else 0.2
    balance = layer.config.balance.replace(rate=rate)
    return layer._replace(config=dataclasses.replace(layer.config, balance=balance))

  made = surgery.on_layers(model, change)
  assert [repeat for _, repeat in made.config.segments] == [1, 2, 1]
  assert set(made.params) == set(surgery.model_of(made.module()).params)
  found = surgery.moved(model, made, cases.sample())
  # One loop over layers or several: the same operations in the same order.
  assert found == {"tokens": 42.0, "largest": 0.0, "kl": 0.0}


def test_a_receipt_says_how_far_the_outputs_moved():
  model, sample = cases.model(cases.config()), cases.sample()
  name = "embed.embedding"
  params = dict(model.params) | {name: 1.5 * model.params[name]}
  other = model._replace(params=params)
  made = surgery.receipt(
    "louder", model, other, settings={"times": 1.5}, kept=[[0], [1]], sample=sample
  )
  old, new = (
    cases.logits(m, sample).astype(np.float64)[np.asarray(sample.segment) > 0]
    for m in (model, other)
  )
  log = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (old, new)]
  kl = (np.exp(log[0]) * (log[0] - log[1])).sum(-1).mean()
  assert made.moved is not None
  np.testing.assert_allclose(made.moved["kl"], kl, rtol=1e-4)
  np.testing.assert_allclose(made.moved["largest"], abs(new - old).max(), rtol=1e-5)
  assert made.parameters["total"][0] == sum(x.size for x in model.params.values())
  assert made.to_json()["kept"] == [[0], [1]] and len(made.lines()) == 2


def test_other_vocabularies_cannot_be_compared():
  model = cases.model(cases.config())
  other = model._replace(config=dataclasses.replace(model.config, vocab_size=14))
  with pytest.raises(ValueError, match="vocab_size=14 after, 13 before"):
    surgery.moved(model, other, cases.sample())


def test_a_dense_block_has_no_sparse_layer():
  dense, *_ = surgery.blocks(cases.model(cases.config()))
  with pytest.raises(TypeError, match="is dense"):
    dense.layer  # noqa: B018


def test_arrays_on_devices_stay_there_and_others_on_the_host():
  model = cases.model(cases.config())
  on_host = surgery.on_layers(model, lambda _, layer: layer)
  assert all(isinstance(x, np.ndarray) for x in on_host.params.values())
  there = model._replace(params=jax.tree.map(jax.numpy.asarray, dict(model.params)))
  made = surgery.on_layers(there, lambda _, layer: layer)
  assert all(isinstance(x, jax.Array) for x in made.params.values())
  assert frame.blueprint(made.config) == frame.blueprint(model.config)
