"""Pure steps, the optimizer's roles, the loop."""
# SPDX-License-Identifier: Apache-2.0

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import loop, optim
from experiments.checkpoint import digests
from experiments.config import Optim
from experiments.errors import Diverged


def test_a_step_is_a_pure_function_of_state_and_batch(job):
  state, batch = job.init(), next(job.batches())
  before = digests(state)
  first, metrics = job.train_step(state, batch)
  again, same = job.train_step(state, batch)
  assert digests(first) == digests(again) and digests(metrics) == digests(same)
  assert digests(state) == before
  assert int(first.step) == 1


def test_steps_lower_the_loss_and_compile_once(job):
  state, batch = job.init(), next(job.batches())
  losses = []
  state, _ = job.train_step(state, batch)
  compiled = job.train_step._cache_size()
  for _ in range(10):
    state, metrics = job.train_step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.5
  state, _ = job.train_step(state, next(job.batches(seed=1)))
  assert job.train_step._cache_size() == compiled


def test_metrics_say_what_the_router_did(job):
  _, metrics = job.train_step(job.init(), next(job.batches()))
  chex.assert_rank(list(metrics.values()), 0)
  chex.assert_tree_all_finite(metrics)
  assert {"bits_per_byte", "entropy", "load_balance", "router_z"} <= set(metrics)
  assert float(metrics["dropped"]) == 0  # dropless
  assert 1 <= float(metrics["skew"]) <= 4  # of four experts


def test_parameters_get_their_role_by_name(job):
  roles = {name: optim.role(name) for name in job.names}
  assert set(roles.values()) == set(optim.ROLES)
  assert roles["embed.embedding"] == "embedding"
  assert roles["segments.0.1.moe.gate.kernel_DE"] == "gate"
  assert roles["segments.0.1.moe.experts.gate_EDF"] == "expert"
  assert roles["segments.0.0.ff.gate.kernel"] == "matrix"
  assert roles["segments.0.0.ff_norm.scale"] == "norm"


def test_decay_and_learning_rate_depend_on_the_role(job):
  names = list(job.names)
  config = Optim(0.1, 0, weight_decay=0.5, role_factors=(("gate", 0.0),))
  optimizer = optim.optimizer(config, steps=10, names=names)
  params = {name: jnp.ones(2) for name in names}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  for name in names:
    decays = optim.role(name) in ("expert", "matrix")
    assert bool(jnp.any(updates[name] != 0)) == decays, name
  ones = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(ones, optimizer.init(params), params)
  assert not np.any(updates["segments.0.1.moe.gate.kernel_DE"])
  assert np.all(updates["embed.embedding"] < 0)


def test_the_schedule_warms_up_and_ends_at_its_fraction():
  optimizer = optim.optimizer(
    Optim(1.0, 2, end_fraction=0.1, clip=1e9), steps=10, names=["embed.embedding"]
  )
  params = {"embed.embedding": jnp.ones(1)}
  state, sizes = optimizer.init(params), []
  for _ in range(11):
    updates, state = optimizer.update(params, state, params)
    sizes.append(-float(updates["embed.embedding"][0]))
  np.testing.assert_allclose(
    [sizes[0], sizes[1], sizes[2], sizes[10]], [0, 0.5, 1, 0.1], rtol=1e-4
  )
  assert isinstance(optimizer, optax.GradientTransformation)


class Counted:
  """A step count that tells when somebody looks at a metric."""

  def __init__(self, log):
    self.log = log

  def step(self, state, batch):
    self.log.append(("step", int(state.step) + 1))
    return type(state)(state.step + 1), {"loss": int(state.step) + 1}


def test_metrics_of_a_step_are_read_while_the_next_one_runs():
  log = []

  class State:
    def __init__(self, step):
      self.step = step

  loop.train(
    State(2),
    iter([{}] * 9),
    train_step=Counted(log).step,
    steps=7,
    save_every=3,
    save=lambda state: log.append(("save", state.step)),
    report=lambda step, metrics: log.append(("report", step, metrics["loss"])),
  )
  assert log == [
    *[("step", 3), ("report", 3, 3), ("save", 3)],  # what is saved was reported
    *[("step", 4), ("step", 5), ("report", 4, 4)],
    *[("step", 6), ("report", 5, 5), ("report", 6, 6), ("save", 6)],
    *[("step", 7), ("report", 7, 7), ("save", 7)],
  ]


def make_report(path, step=0):
  return loop.Report(path, name="test", step=step, steps=9, tokens=128)


def test_a_resumed_run_lists_no_step_twice(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  values = {"loss": 1.0, "bits_per_byte": 1.5, "dropped": 0.25, "skew": 2.0}
  report = make_report(path)
  for step in range(1, 6):
    report(step, values)
  report.close()
  with path.open("a") as file:
    file.write('{"step": 6, "lo')  # killed while writing
  report = make_report(path, step=3)
  report(4, values)
  report.close()
  assert [json.loads(s)["step"] for s in path.open()] == [1, 2, 3, 4]
  shown = capsys.readouterr()
  assert "1.500 bits/byte" in shown.err and "drops 25.0%, skew 2.00" in shown.err
  assert shown.out == ""


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
  report = make_report(tmp_path / "metrics.jsonl")
  with pytest.raises(Diverged, match="step 1: the loss is nan"):
    report(1, {"loss": float("nan"), "bits_per_byte": float("nan")})
  report.close()
