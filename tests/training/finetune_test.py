"""A run that starts with another's model, and learns from answers alone."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optim, state as states, step
from experiments.checkpoint import digests
from jmoe.models import cross_entropy
from tests.tolerance import assert_close


@pytest.fixture(scope="module")
def question(job):
  """A batch whose first ten tokens of a row are a prompt."""
  batch = dict(next(job.batches()))
  batch["scored"] = np.tile(np.arange(32) >= 10, (4, 1)).astype(np.int32)
  return batch


def changed(batch, name, where):
  """Other tokens in some places; those of padding count for nothing anyhow."""
  return batch | {name: np.where(where, (batch[name] + 7) % 250, batch[name])}


def test_the_targets_of_a_prompt_have_no_loss_and_no_gradient(job, question):
  state = job.init()
  after, metrics, _ = job.train_step(state, question)
  prompt = question["scored"] == 0
  other, said, _ = job.train_step(state, changed(question, "targets", prompt))
  assert digests(other) == digests(after) and digests(said) == digests(metrics)
  other, said, _ = job.train_step(state, changed(question, "targets", ~prompt))
  assert digests(other) != digests(after) and said["loss"] != metrics["loss"]
  # What a prompt says is seen all the same.
  _, said, _ = job.train_step(state, changed(question, "inputs", prompt))
  assert said["loss"] != metrics["loss"]


def test_the_loss_is_the_mean_over_answers(question):
  random = np.random.default_rng(0)
  logits_BSV = random.normal(size=(4, 32, 258)).astype(np.float32)

  counts_T = step.counted(question).reshape(-1)

  def loss(logits_BSV):
    target_T, weight_T = question["targets"].reshape(-1), counts_T / jnp.sum(counts_T)
    logits_TV = logits_BSV.reshape(-1, 258)
    return cross_entropy(logits_TV, jnp.eye(258), target_T, weight_T)[0]

  found, slope_BSV = jax.value_and_grad(loss)(logits_BSV)
  answer_BS = (question["scored"] > 0) & (question["segment"] > 0)
  nats = []
  for row, place in np.argwhere(answer_BS):
    logits_V = logits_BSV[row, place].astype(np.float64)
    target = question["targets"][row, place]
    nats.append(np.log(np.exp(logits_V).sum()) - logits_V[target])
  assert_close(found, np.float32(np.mean(nats)))
  used_BS = np.any(np.asarray(slope_BSV) != 0, axis=-1)
  np.testing.assert_array_equal(used_BS, answer_BS)


def test_a_run_starts_with_the_model_of_another_and_nothing_else_of_it(job):
  other = job.init()
  for batch in [next(job.batches()), next(job.batches(seed=1))]:
    other, *_ = job.train_step(other, batch)
  bias = {"segments.0.1.moe.state.bias": np.arange(4, dtype=np.float32)}
  state = dataclasses.replace(job.init(), balance={n: 0 * x for n, x in bias.items()})
  saved = {name: np.asarray(x) for name, x in other.params.items()}  # as from a disk
  started = states.restarted(state, saved, bias, optimizer=job.optimizer)
  chex.assert_trees_all_equal(started.params, other.params)
  chex.assert_trees_all_equal(started.balance, bias)
  assert int(started.step) == int(started.skipped) == 0
  chex.assert_trees_all_equal(started.optimizer, state.optimizer)


def test_bfloat16_parameters_start_from_float32_ones_with_all_their_bits(job):
  _, shapes = states.blueprint(job.run.model, "bfloat16")
  optimizer = optim.optimizer(job.run.optim, steps=9, params=shapes)
  saved = {name: np.asarray(x) for name, x in job.init().params.items()}
  state = dataclasses.replace(job.init(), params=states.stored(saved, "bfloat16"))
  started = states.restarted(state, saved, {}, optimizer=optimizer)
  for name, copy in started.optimizer.master.items():
    np.testing.assert_array_equal(copy, saved[name])
    assert started.params[name].dtype == jnp.bfloat16, name
    assert_close(started.params[name], saved[name], name)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"a": None}, "missing: a"),
    ({"d": (4,), "e": ()}, "not in this model: d, e"),
    ({"b": (3, 2)}, r"of another shape: b (3, 2), not (2, 3)"),
    ({"a": None, "d": (4,), "b": ()}, "missing: a; not in this model: d; of another"),
  ],
)
def test_another_model_is_refused_on_one_line_that_names_all_that_differs(change, said):
  shapes: dict = {"a": (4,), "b": (2, 3), "c": ()}
  like = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
  shapes |= change
  saved = {n: np.zeros(s, np.float32) for n, s in shapes.items() if s is not None}
  with pytest.raises(ValueError) as found:
    states.started_from(like, saved)
  assert said in str(found.value) and "\n" not in str(found.value)
  assert "start from a run of the same model" in str(found.value)
