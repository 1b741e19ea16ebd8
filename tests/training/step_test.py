"""Pure steps: what they change, count and report; several seeds at once."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import json
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optim, routing, seeds, state as states, step
from experiments.checkpoint import digests
from experiments.config import Optim
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from jmoe.models import cross_entropy
from jmoe.types import Mixing
from tests.compilations import COMPILED
from tests.tolerance import assert_close
from tests.training.conftest import QUICK


def test_a_step_is_a_pure_function_of_state_and_batch(job):
  state, batch = job.init(), next(job.batches())
  before = digests(state)
  first, *said = job.train_step(state, batch)
  again, *same = job.train_step(state, batch)
  assert digests(first) == digests(again) and digests(said) == digests(same)
  assert digests(state) == before
  assert int(first.step) == 1


def test_steps_lower_the_loss_and_compile_once(job):
  state, batch = job.init(), next(job.batches())
  losses = []
  state, *_ = job.train_step(state, batch)
  COMPILED.clear()
  for _ in range(10):
    state, metrics, _ = job.train_step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.5
  state, *_ = job.train_step(state, next(job.batches(seed=1)))
  assert not COMPILED


def test_metrics_say_what_the_router_did(job):
  batch = next(job.batches())
  _, metrics, found = job.train_step(job.init(), batch)
  chex.assert_rank(list(metrics.values()), 0)
  chex.assert_tree_all_finite(metrics)
  assert {"bits_per_byte", "entropy", "load_balance", "router_z"} <= set(metrics)
  assert float(metrics["dropped"]) == float(metrics["skipped"]) == 0  # dropless
  (layer,) = json.loads(json.dumps(routing.layers(job.run.model, found)))
  assert layer["name"] == "layer 1"  # behind a dense one
  assert sum(layer["load"]) == 2 * np.sum(batch["segment"] > 0)
  skew = max(layer["load"]) / np.mean(layer["load"])
  assert_close(metrics["skew"], np.float32(skew))
  assert layer["entropy"] == float(metrics["entropy"])
  assert set(layer["dropped"].values()) == {0.0}


def test_layers_are_told_in_order_of_depth():
  attention = Attention(num_heads=2)
  small, large = (simple(8, 4, num_experts=n) for n in (2, 3))
  dense, a, b = (BlockConfig(attention, ff) for ff in (Dense(4), small, large))
  model = ModelConfig(9, 8, segments=(((dense,), 1), ((a, b, dense), 2), ((a,), 1)))
  found = tuple(
    routing.Stack(
      jnp.full((len(depths), experts), 10, jnp.int32) * jnp.array(depths)[:, None],
      jnp.array(depths, jnp.float32),
      {"capacity": jnp.array(depths, jnp.float32) / 8},
    )
    for depths, experts in (([1, 4], 2), ([2, 5], 3), ([7], 2))
  )
  told = routing.layers(model, found)
  assert [layer["name"] for layer in told] == [f"layer {n}" for n in (1, 2, 4, 5, 7)]
  assert told[3] == {
    "name": "layer 5",
    "choices": 2,
    "load": [50, 50, 50],
    "entropy": 5.0,
    "dropped": {"capacity": 0.625},
  }
  arrays = routing.by_depth(model, [stack.load for stack in found])
  assert [(name, x.tolist()) for name, x in arrays] == [
    (layer["name"], layer["load"]) for layer in told
  ]


def test_a_loss_that_is_no_number_changes_no_bit(job):
  batches = job.batches()
  state, *_ = job.train_step(job.init(), next(batches))
  name = "segments.0.1.moe.experts.up_EDF"
  broken = state.params | {name: state.params[name].at[0, 1, 2, 3].set(jnp.nan)}
  broken = dataclasses.replace(state, params=broken)
  before = digests(broken)
  after, metrics, _ = job.train_step(broken, next(batches))
  assert math.isnan(metrics["loss"]) and float(metrics["skipped"]) == 1
  changed = {leaf for leaf, digest in digests(after).items() if digest != before[leaf]}
  assert changed == {"step", "skipped"}
  assert (int(after.step), int(after.skipped)) == (2, 1)
  healed, metrics, _ = job.train_step(
    dataclasses.replace(after, params=state.params), next(batches)
  )
  assert (int(healed.step), int(healed.skipped), float(metrics["skipped"])) == (3, 1, 0)


class Bigrams:
  """A model in place of a decoder: a row of logits for each token, and no router.

  Its hidden states are one-hot tokens, which a table takes to logits.
  """

  def __init__(self, logits_of=lambda table: table):
    self.logits_of = logits_of

  def model(self, params, balance):
    del balance
    table_VV = self.logits_of(params["embed.embedding"])

    def loss(x_BSV, *each, **keywords):
      flat = [x.reshape(-1) for x in each]
      total, nats_T = cross_entropy(x_BSV.reshape(-1, V), table_VV, *flat, **keywords)
      return total, nats_T.reshape(x_BSV.shape[:2])

    def hidden(tokens_BS, *_, **__):
      return jax.nn.one_hot(tokens_BS, V), ()

    return types.SimpleNamespace(hidden=hidden, cross_entropy=loss)

  def balanced(self, params, balance, infos):
    del params, infos
    return balance


V = 6


def bigrams(config, *, scored=1, steps=8, seed=0, **keywords):
  """(jitted step, state, batch [4,5]) of `Bigrams`."""
  random = np.random.default_rng(seed)
  params = {"embed.embedding": random.normal(size=(V, V)).astype(np.float32)}
  optimizer = optim.optimizer(config, steps=steps, params=params)
  zero = jnp.zeros((), jnp.int32)
  key = jax.random.key_data(jax.random.key(0))
  state = states.TrainState(zero, zero, key, params, {}, optimizer.init(params))
  ones = np.ones((4, 5), np.int32)
  batch = {
    "inputs": random.integers(0, V, (4, 5)).astype(np.int32),
    "targets": random.integers(0, V, (4, 5)).astype(np.int32),
    "segment": ones,
    "position": ones,
    "scored": ones * np.int32(scored),
  }
  keywords = {"blueprint": Bigrams(), "loss_weights": ()} | keywords
  function = functools.partial(step.train_step, optimizer=optimizer, **keywords)
  return jax.jit(function, compiler_options=QUICK), state, batch


PLAIN = Optim(0.1, 0, schedule="constant", clip=0.0)


def test_a_gradient_that_is_no_number_is_skipped_though_the_loss_is_one():
  blueprint = Bigrams(lambda table: table + jnp.sqrt(table * 0))  # slope 1/0 at zero
  train_step, state, batch = bigrams(PLAIN, blueprint=blueprint)
  after, metrics, _ = train_step(state, batch)
  assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["gradient_norm"])
  assert (float(metrics["skipped"]), int(after.skipped), int(after.step)) == (1, 1, 1)
  for part in ("params", "optimizer"):
    chex.assert_trees_all_equal(getattr(after, part), getattr(state, part))


def test_the_logits_z_loss_is_a_mean_over_scored_tokens():
  scored = np.array([[0, 1, 1, 0, 1]] * 4)
  plain, state, batch = bigrams(PLAIN, scored=scored)
  with_z, *_ = bigrams(PLAIN, scored=scored, logits_z_loss=0.5)
  squares = []
  for token, counts in zip(batch["inputs"].flat, batch["scored"].flat, strict=True):
    row = state.params["embed.embedding"][token].astype(np.float64)
    squares += [math.log(np.exp(row).sum()) ** 2] if counts else []
  losses = [float(f(state, batch)[1]["loss"]) for f in (plain, with_z)]
  assert_close(np.float32(losses[1] - losses[0]), np.float32(0.5 * np.mean(squares)))


def test_bits_are_those_of_the_bytes_that_tokens_stand_for():
  lengths = np.array([1, 2, 3, 4, 5, 0], np.int32)
  scored = np.array([[1, 1, 0, 1, 1]] * 4)
  of_tokens, state, batch = bigrams(PLAIN, scored=scored)
  of_bytes, *_ = bigrams(PLAIN, scored=scored, byte_lengths=lengths)
  size = np.float32(np.sum(lengths[batch["targets"]] * scored))
  each, per_byte = (f(state, batch)[1] for f in (of_tokens, of_bytes))
  assert_close(each["bits_per_byte"], each["loss"] / math.log(2))
  assert_close(per_byte["bits_per_byte"], each["bits_per_byte"] * 16 / size)


def test_accumulated_batches_make_the_step_of_one_joined_batch():
  whole, state, batch = bigrams(PLAIN)
  joined, *_ = whole(state, batch)
  parts, start, _ = bigrams(dataclasses.replace(PLAIN, accumulate=2))
  halves = [
    jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in ([0, 1], [2, 3])
  ]
  middle, *_ = parts(start, halves[0])
  chex.assert_trees_all_equal(middle.params, start.params)
  end, *_ = parts(middle, halves[1])
  assert_close(end.params["embed.embedding"], joined.params["embed.embedding"])
  assert np.any(end.params["embed.embedding"] != start.params["embed.embedding"])
  # A skipped batch is no part of the mean: the update waits for another.
  broken = {"embed.embedding": np.full((V, V), np.nan, np.float32)}
  lost = dataclasses.replace(middle, params=broken)
  lost, *_ = parts(lost, halves[0])
  end_too, *_ = parts(dataclasses.replace(lost, params=middle.params), halves[1])
  chex.assert_trees_all_equal(end_too.params, end.params)


def test_two_seeds_in_one_program_do_what_each_does_alone(job):
  run = job.run
  keys = jnp.stack([jax.random.key_data(jax.random.key(seed)) for seed in (0, 1)])
  init = functools.partial(states.init_state, config=run.model, optimizer=job.optimizer)
  made = jax.jit(jax.vmap(init)).lower(keys).compile(compiler_options=QUICK)(keys)
  alone = [init(key) for key in keys]
  chex.assert_trees_all_close(made, seeds.stack(alone), rtol=2e-5, atol=1e-6)
  batches = [next(job.batches(seed=seed)) for seed in (0, 1)]
  both = seeds.stack(batches)
  train_step = seeds.jitted(
    functools.partial(
      step.train_step,
      blueprint=job.blueprint,
      optimizer=job.optimizer,
      loss_weights=run.loss_weights,
    )
  )
  train_step = train_step.lower(made, both).compile(compiler_options=QUICK)
  for _ in range(2):  # the first update of a warm-up moves nothing
    steps = [job.train_step(state, batch) for state, batch in zip(alone, batches)]
    alone = [state for state, *_ in steps]
    made, *said = train_step(made, both)
  start = job.init().params
  for one, expected in zip(seeds.unstack((made, *said)), steps, strict=True):
    jax.tree.map(assert_close, one[0], expected[0])
    assert int(one[0].step) == 2
    assert all(np.any(start[name] != x) for name, x in one[0].params.items())
    for name, found in one[1].items():
      assert_close(found, expected[1][name], name)
    chex.assert_trees_all_equal(one[2][0].load, expected[2][0].load)


@pytest.mark.parametrize(
  ("kind", "activations", "tied"),
  [
    ("adamw", "bfloat16", True),
    ("adafactor", "float32", False),
    ("muon", "bfloat16", False),
  ],
)
def test_a_step_keeps_the_dtype_of_bfloat16_parameters(job, kind, activations, tied):
  model = dataclasses.replace(job.run.model, dtype=activations, tied=tied)
  config = dataclasses.replace(job.run.optim, kind=kind, accumulate=2)
  blueprint, shapes = states.blueprint(model, "bfloat16")
  optimizer = optim.optimizer(config, steps=9, params=shapes)
  state = jax.eval_shape(
    functools.partial(
      states.init_state, config=model, optimizer=optimizer, param_dtype="bfloat16"
    ),
    jax.ShapeDtypeStruct((2,), jnp.uint32),
  )
  for name, param in state.params.items():
    small = optim.role(name) in ("gate", "norm")
    assert param.dtype == ("float32" if small else "bfloat16"), name
    assert (name in state.optimizer.master) != small, name
  floats = [x.dtype for x in jax.tree.leaves(state.optimizer) if x.dtype.kind == "f"]
  assert set(floats) == {np.dtype("float32")}
  one = functools.partial(
    step.train_step, blueprint=blueprint, optimizer=optimizer, loss_weights=()
  )
  after, *_ = jax.eval_shape(one, state, next(job.batches()))
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_an_evaluation_counts_each_scored_choice_by_its_domain(job):
  run, state = job.run, job.init()
  batch = dict(next(job.batches()))
  random = np.random.default_rng(0)
  batch["domain"] = random.integers(0, 3, (4, 32)).astype(np.int32)
  batch["scored"] = random.integers(0, 2, (4, 32)).astype(np.int32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(params, balance, batch):
    ones = jnp.ones(run.model.vocab_size, jnp.int32)
    found = step.eval_step(
      params, balance, batch, ones, blueprint=job.blueprint, num_domains=3
    )
    model = job.blueprint.model(params, balance)
    inputs = (batch["inputs"], batch["segment"], batch["position"])
    return found, model(*inputs, look=lambda plan: plan)[1]

  (_, sizes, loads), (info,) = both(state.params, state.balance, batch)
  ((name, load_DE),) = routing.by_depth(run.model, loads)
  expected = np.zeros((3, 4), np.int64)
  asked = info.plan.routing
  for token, expert, queues in zip(
    *(np.asarray(x)[0].tolist() for x in (asked.token, asked.expert, asked.queues)),
    strict=True,
  ):
    if queues and batch["scored"].flat[token]:
      expected[batch["domain"].flat[token], expert] += 1
  np.testing.assert_array_equal(load_DE, expected)
  assert name == "layer 1" and load_DE.dtype == np.int32
  np.testing.assert_array_equal(load_DE.sum(1), 2 * np.asarray(sizes))  # k = 2
  assert 0 < load_DE.sum() < int(info.load.sum())


def test_a_soft_router_has_no_choices_to_count():
  share = jnp.ones((1, 2, 3, 1))
  with pytest.raises(ValueError, match="a soft router makes no choices to count"):
    routing.load_by_domain(
      Mixing(share, share), jnp.zeros(2, int), jnp.ones(2, bool), num_domains=1
    )
