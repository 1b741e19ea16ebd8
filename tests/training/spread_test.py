"""The whole job over a mesh: the numbers of one device, and checkpoints without one."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import itertools
import types
import warnings
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

import jmoe
from experiments import (
  checkpoint,
  configs,
  dry_run,
  fitting,
  main,
  opening,
  program,
  settings,
  spread,
)
from experiments.checkpoint import Checkpoints, digests
from experiments.config import Run, sparse_layers
from experiments.errors import BadCheckpoint, BadConfig
from jmoe.parallel import mesh as meshes
from jmoe.use import use
from tests.tolerance import assert_close
from tests.training.conftest import QUICK

PLACES = "model.segments.0.0"
MESH = "fsdp=2,expert=2,tensor=2"  # the other axes: tests/parallel/model_test.py
FACTS = {"config": {}}


class Plain(NamedTuple):
  """A run on one device, with what its programs are made of."""

  run: Run
  known: dict
  made: program.Program


@pytest.fixture(scope="module")
def plain(job, texts):
  run = settings.with_settings(job.run, ["data.readers=2"])
  # As `job` counts: each token is a byte.
  lengths = np.ones(run.model.vocab_size, np.int32)
  known = dict(byte_lengths=lengths, num_domains=len(texts.domains))
  return Plain(run, known, program.program(run, **known))


@pytest.fixture(scope="module")
def trained(job, plain, encoded):
  """(state after two steps, what the last one said, evaluation) of one device."""
  batches = opening.training_batches(plain.run, encoded)
  state, outcome = plain.made.init(), None
  for _ in range(2):
    state, *outcome = job.train_step(state, next(batches))
  held_out = next(opening.held_out_batches(plain.run, encoded))
  evaluate = jax.jit(plain.made.eval_step, compiler_options=QUICK)
  return state, outcome, evaluate(state.params, state.balance, held_out)


@pytest.fixture(scope="module")
def spread_run(plain, encoded, tmp_path_factory):
  """The same over a mesh, and a checkpoint of it with the batches that follow."""
  found = spread.Spread(meshes.make(MESH))
  made = program.program(plain.run, **plain.known, spread=found)
  step, batches = found.train_step(made), opening.training_batches(plain.run, encoded)
  state, outcome = found.init(made), None
  for _ in range(2):
    batch = next(batches)
    with jax.transfer_guard("disallow"):  # what is put is put by name
      state, *outcome = step(state, batch)
  assert step.jitted._cache_size() == 1
  held_out = next(opening.held_out_batches(plain.run, encoded))
  evaluation = found.eval_step(made)(state.params, state.balance, held_out)
  folder = tmp_path_factory.mktemp("spread") / "checkpoints"
  checkpoints = Checkpoints(folder, FACTS)
  checkpoints.save(state, batches)
  checkpoints.close()
  following = list(itertools.islice(batches, 2))
  return (state, outcome, evaluation), folder, following


def test_a_run_over_a_mesh_has_the_numbers_of_one_device(trained, spread_run):
  jax.tree.map(assert_close, *map(jax.device_get, (spread_run[0], trained)))
  loads = trained[1][1][0].load, trained[2][2]
  found = spread_run[0][1][1][0].load, spread_run[0][2][2]
  chex.assert_trees_all_equal(*map(jax.device_get, (found, loads)))


def test_parameters_and_moments_lie_as_the_table_says(spread_run):
  state = spread_run[0][0]
  expected = {
    "segments.0.1.moe.experts.up_EDF": (1, 1, 16, 8),
    "segments.0.1.moe.gate.kernel_DE": (1, 16, 4),
    "segments.0.0.attention.query.kernel": (1, 8, 8),
    "embed.embedding": (129, 8),
  }
  moments = next(x for x in state.optimizer.chain if hasattr(x, "mu"))
  for name, shape in expected.items():
    for tree in (state.params, moments.mu, moments.nu):
      assert tree[name].addressable_shards[0].data.shape == shape, name
  # What `--dry-run` says a device holds is what it holds.
  over = spread.Spread(state.step.sharding.mesh)
  held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.optimizer)]
  assert dry_run._bytes(over.shapes(state).optimizer) == sum(held)
  assert 2 * sum(held) < sum(x.nbytes for x in jax.tree.leaves(state.optimizer))


@pytest.mark.parametrize(
  ("mesh", "devices"),
  [("data=2,expert=4", 8), ("expert=2,fsdp=2", 4), ("fsdp=2", 2), (None, 1)],  # from 8
)
def test_a_checkpoint_is_restored_bit_for_bit_on_any_devices(
  plain, encoded, spread_run, mesh, devices
):
  (saved, *_), folder, following = spread_run
  like = jax.eval_shape(plain.made.init)
  if mesh is not None:
    made = meshes.make(mesh, devices=jax.devices()[:devices])
    like = spread.Spread(made).shapes(like)
  batches = opening.training_batches(plain.run, encoded)
  checkpoints = Checkpoints(folder, FACTS)
  state = checkpoints.restore(like, batches)
  checkpoints.close()
  assert digests(state) == digests(saved)
  assert all(len(x.devices()) == devices for x in jax.tree.leaves(state))
  chex.assert_trees_all_equal(list(itertools.islice(batches, 2)), following)


def test_a_reader_alone_goes_on_with_its_own_rows(plain, encoded, spread_run):
  _, folder, following = spread_run
  batches = opening.training_batches(plain.run, encoded, readers=(1,))
  checkpoints = Checkpoints(folder, FACTS)
  checkpoints.restore(jax.eval_shape(plain.made.init), batches)
  checkpoints.close()
  chex.assert_trees_all_equal(
    next(batches), {name: x[2:] for name, x in following[0].items()}
  )


def test_layers_of_a_checkpoint_are_those_of_either_shell(plain, spread_run):
  saved = checkpoint.read(spread_run[1])
  prefix = "segments.0.1.moe."
  named = {n.removeprefix(prefix): x[0] for n, x in saved.params.items() if prefix in n}
  params = traverse_util.unflatten_dict(named, sep=".")
  config = plain.run.model.segments[0][0][1].ff
  config = dataclasses.replace(config, sharding=jmoe.parallel.EXPERT_FSDP)
  moe = nnx.eval_shape(lambda: jmoe.nnx.MoE(config, rngs=nnx.Rngs(0)))
  state = nnx.state(moe, nnx.Param)
  nnx.replace_by_pure_dict(state, params)
  nnx.update(moe, state)
  x_BSD = jax.random.normal(jax.random.key(0), (8, 4, 16))
  with jax.set_mesh(meshes.make("data=2,expert=4")):
    y_BSD, _ = moe(x_BSD)
    again, _ = jmoe.linen.MoE(config).apply({"params": params}, x_BSD)
  np.testing.assert_array_equal(*map(jax.device_get, (y_BSD, again)))


def test_missing_and_extra_leaves_are_named_on_one_line(plain, encoded, spread_run):
  like = jax.eval_shape(plain.made.init)
  some = dict(like.params)
  some["other.kernel"] = some.pop("norm.scale")
  checkpoints = Checkpoints(spread_run[1], FACTS)
  with pytest.raises(BadCheckpoint) as caught:
    batches = opening.training_batches(plain.run, encoded)
    checkpoints.restore(dataclasses.replace(like, params=some), batches)
  checkpoints.close()
  said = str(caught.value)
  assert "without params/other.kernel and with params/norm.scale" in said
  assert "\n" not in said


HEADS = [
  f"{PLACES}.{n}.attention.num_{kind}=4"
  for n in (0, 1)
  for kind in ("heads", "kv_heads")
]


@pytest.mark.parametrize(
  ("mesh", "changes", "said"),
  [
    ("data=3", [], "data=3 is 3 devices, but there are 8; data=8 would do"),
    ("dta=8", [], "unknown axis 'dta'; did you mean 'data'?"),
    ("data=2,data=4", [], "axis 'data' is listed twice"),
    ("data=x", [], "data='x' must be a whole number"),
    ("expert=8", [], "expert=8 does not divide num_experts=4; use 4"),
    ("data=8", [], "data.batch=4 is not divisible by data*fsdp*expert=8; use --set"),
    ("tensor=2,expert=4", [], "tensor=2 does not divide num_kv_heads=1; use 1"),
    ("context=8", ["data.seq=36"], "context=8 does not divide data.seq=36"),
    (
      "tensor=4,fsdp=2",
      HEADS,
      "does not divide vocab_size=258; use 3 or 6, or --set model.vocab_size=260",
    ),
    ("data=2,expert=4", ["--strategy", "all_to_al"], "did you mean 'all_to_all'?"),
    ("expert=4,context=2", ["--strategy", "all_to_all"], "dispatch=all_to_all"),
    ("data=2,context=4", ["data.readers=3"], "data.readers=3 does not divide data.bat"),
  ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_line(
  tmp_path, capsys, monkeypatch, mesh, changes, said
):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # leaves that of the tests alone
  arguments = ["--config", "micro", "--workdir", str(tmp_path / "run"), "--mesh", mesh]
  if "--strategy" in changes:
    arguments += changes
  else:
    arguments += [part for change in changes for part in ("--set", change)]
  assert main.main([*arguments, "--cache", str(tmp_path / "cache")]) == 2
  shown = capsys.readouterr()
  assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("group_size", "overlap", "said"),
  [
    (None, 1, "group_size=None: groups of 128 tokens straddle shards of 16 tokens"),
    (16, 3, "overlap=3 does not divide the capacity of"),
  ],
)
def test_layers_that_do_not_fit_are_named_before_anything_is_compiled(
  job, group_size, overlap, said
):
  run = settings.with_settings(job.run, [f"{PLACES}.1.ff.group_size={group_size}"])
  (((dense, sparse), repeat),) = run.model.segments
  ff = dataclasses.replace(
    sparse.ff,
    capacity=jmoe.use(jmoe.assign.capacity.by_factor, factor=1.0),
    dispatch=jmoe.use(jmoe.dispatch.all_to_all, overlap=overlap),
  )
  blocks = (dense, dataclasses.replace(sparse, ff=ff))
  model = dataclasses.replace(run.model, segments=((blocks, repeat),))
  with pytest.raises(BadConfig) as caught:
    fitting.make(dataclasses.replace(run, model=model), "expert=4,context=2")
  assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--distributed"], "--distributed needs --mesh"),
    (["--processes", "2"], "need --distributed"),
    (["--wait", "5"], "need --distributed"),
    (["--distributed", "--mesh", "data=8", "--wait", "0"], "--wait 0 is no time"),
    (["--strategy", "all_gather"], "needs --mesh"),
    (["--distributed", "--mesh", "data=8", "--processes", "2"], "go together"),
    (
      ["--distributed", "--mesh", "data=8", "--coordinator", "here", "--processes"]
      + ["2", "--process", "0"],
      "--coordinator here is not HOST:PORT",
    ),
    (
      ["--distributed", "--mesh", "data=8", "--coordinator", "here:1", "--processes"]
      + ["2", "--process", "2"],
      "--process 2 is none of --processes 2; give 0 to 1",
    ),
    (
      ["--distributed", "--mesh", "data=8", "--coordinator", "here:1", "--processes"]
      + ["0", "--process", "0"],
      "--processes 0: give how many there are, from 1",
    ),
    (
      ["--distributed", "--mesh", "data=8", "--coordinator", "here:99999"]
      + ["--processes", "2", "--process", "0"],
      "--coordinator here:99999: there is no port 99999; give one of 1 to 65535",
    ),
  ],
)
def test_processes_that_cannot_be_are_one_line(tmp_path, capsys, arguments, said):
  some = ["--config", "micro", "--workdir", str(tmp_path / "run"), *arguments]
  assert main.main(some) == 2
  shown = capsys.readouterr()
  assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""


@pytest.mark.parametrize("platform, devices, hides", [
  ("gpu", 2, True), ("gpu", 1, False), ("cpu", 2, False), ("tpu", 2, False),
])  # fmt: skip
def test_only_a_step_over_several_gpus_tells_the_compiler(platform, devices, hides):
  """On GPUs what travels is to do so beside products; others do not know the words."""
  model = configs.load("micro").model
  over = spread.Spread(_seeming(platform, devices))
  told = over._options(model)
  assert (told is not None) == hides
  if told is not None:
    assert told["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert "xla_gpu_collective_permute_mode" not in told


@pytest.mark.parametrize("name", ["all_gather", "all_to_all"])
def test_own_rows_first_go_by_copy_engines_where_one_process_has_the_gpus(
  name, monkeypatch
):
  made = meshes.make(MESH)
  model = configs.load("micro").model
  if name == "all_to_all":  # whose own way to hide is left out
    limit = use(jmoe.capacity.by_factor, factor=1.5)
    ff = dataclasses.replace(
      sparse_layers(model)[0],
      capacity=limit,
      dispatch=use(jmoe.dispatch.all_to_all, overlap=2),
    )
    block = dataclasses.replace(model.segments[0][0][0], ff=ff)
    model = dataclasses.replace(model, segments=(((block,), 2),))
  asked = spread.Spread(made, strategy=f"{name}+own_first")
  assert asked.said(model).endswith(f", dispatch {name}+own_first")
  model = asked.model(model)
  (used,) = {ff.dispatch for ff in sparse_layers(model)}
  assert (used.name, used.kwargs) == (name, {"own_first": True})
  over = spread.Spread(_seeming("gpu", 4))
  mode = "xla_gpu_collective_permute_mode"
  assert over._options(model)[mode] == "COLLECTIVES_PEER_MEMORY"
  assert spread.Spread(_seeming("cpu", 4))._options(model) is None
  with monkeypatch.context() as several:
    several.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match="2 processes .* slower"):
      assert mode not in over._options(model)
    with warnings.catch_warnings(action="error"):
      assert mode not in over._options(model, warn=False)
  monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
  with pytest.warns(UserWarning, match="jax 0.10"):  # the compiler lacks the word
    assert mode not in over._options(model)


def test_evaluation_tells_the_compiler_what_training_does(monkeypatch):
  over, told = spread.Spread(meshes.make(MESH)), []
  monkeypatch.setattr(spread.Spread, "_options", lambda *_, warn=True: {"told": warn})
  keep = lambda function, **given: told.append(given["compiler_options"])  # noqa: E731
  monkeypatch.setattr(spread.jax, "jit", keep)
  over.eval_step(types.SimpleNamespace(eval_step=None, model=None))  # type: ignore
  assert told == [{"told": False}]


def _seeming(platform: str, devices: int) -> Any:
  """As much of a mesh as options ask for."""
  there = np.array([types.SimpleNamespace(platform=platform)] * devices)
  return types.SimpleNamespace(size=devices, devices=there)
