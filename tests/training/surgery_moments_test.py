"""What an operation on a run in the middle of its training leaves of the optimizer."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import (
  carried,
  checkpoint,
  opening,
  optim,
  recorded,
  spread,
  state as states,
  surgery,
  workdir,
)
from experiments.digests import named
from jmoe import surgery as pure
from jmoe.parallel import mesh as meshes
from tests import _cases

EXPERTS, GATE = "segments.0.1.moe.experts.up_EDF", "segments.0.1.moe.gate.kernel_DE"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the process keeps its own
  with _cases.quickly():
    yield


def stepped(job, state, batches, steps=2):
  for _ in range(steps):
    state = job.train_step(state, next(batches))[0]
  return jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def begun(job, texts, encoded, tmp_path_factory):
  """(folder of a run that has done two of its steps, its state two steps later)."""
  folder = epath.Path(tmp_path_factory.mktemp("runs") / "begun")
  workdir.claim(job.run, folder)
  batches = opening.training_batches(job.run, encoded)
  state = stepped(job, job.init(), batches)
  facts = opening.facts(job.run, texts, encoded)
  saved = checkpoint.Checkpoints(folder / "checkpoints", facts)
  saved.save(state, batches)
  saved.close()
  return folder, stepped(job, state, batches)


def made(begun, cache, out, name, *own):
  """The receipt's word on moments, and what the new run's checkpoint holds."""
  given = ["--workdir", str(begun[0]), "--out", str(out), "--cache", str(cache)]
  surgery.operate(name, [*given, *own])
  receipt = json.loads((out / "receipt.json").read_text())
  return receipt["notes"]["moments"], recorded.read(epath.Path(out))[2]


def of(saved, kind, name):
  """A moment of AdamW."""
  (found,) = [x for p, x in saved.optimizer.items() if p.endswith(f"/{kind}/{name}")]
  return found


def test_all_experts_go_on_as_if_nothing_was_done_to_the_bit(
  begun, cache, texts, encoded, job, tmp_path
):
  out = tmp_path / "same"
  own = ["--domain", "code", "--keep", "4", "--score", "random"]
  said, _ = made(begun, cache, out, "extract", *own)
  assert said == "go on from step 2"
  run = recorded.config(epath.Path(out))
  facts = opening.facts(run, texts, encoded)
  there = checkpoint.Checkpoints(epath.Path(out) / "checkpoints", facts)
  batches = opening.training_batches(run, encoded)
  like = jax.eval_shape(job.init)
  restored = there.restore(like, batches)
  # Over a mesh it is the same, and split.
  over = spread.Spread(meshes.make("fsdp=2,expert=4", devices=jax.devices()[:8]))
  split = there.restore(over.shapes(like), batches)
  there.close()
  for name, x in named(split).items():
    np.testing.assert_array_equal(x, named(restored)[name], name)
    if name.endswith(EXPERTS):  # its moments too
      assert x.sharding.shard_shape(x.shape) == (1, 1, 8, 16), name
  state = stepped(job, restored, batches)
  for name, expected in named(begun[1]).items():
    np.testing.assert_array_equal(named(state)[name], expected, name)


def test_moments_go_with_the_experts_that_are_kept(begun, cache, tmp_path):
  old = recorded.read(begun[0])[2]
  own = ["--domain", "code", "--keep", "2", "--score", "random"]
  said, new = made(begun, cache, tmp_path / "cut", "extract", *own)
  assert said == "go on from step 2" and new.step == 2
  (kept,) = json.loads((tmp_path / "cut" / "receipt.json").read_text())["kept"]
  for kind in ("mu", "nu"):
    assert of(old, kind, EXPERTS).any()
    np.testing.assert_array_equal(
      of(new, kind, EXPERTS), of(old, kind, EXPERTS)[:, kept]
    )
    np.testing.assert_array_equal(of(new, kind, GATE), of(old, kind, GATE)[..., kept])
  counts = {p: int(x) for p, x in new.optimizer.items() if p.endswith("/count")}
  assert counts and set(counts.values()) == {2}
  assert new.positions == old.positions
  np.testing.assert_array_equal(new.rest["key"], old.rest["key"])


def test_new_experts_have_moments_of_zero_and_gates_keep_theirs(begun, cache, tmp_path):
  old = recorded.read(begun[0])[2]
  said, new = made(
    begun, cache, tmp_path / "grown", "grow", "--new", "3", "--bias", "-1",
    "--set", "data.seed=5",
  )  # fmt: skip
  assert said == "go on from step 2, the data begins anew"
  assert new.positions != old.positions
  for kind in ("mu", "nu"):
    experts, gate = of(new, kind, EXPERTS), of(new, kind, GATE)
    np.testing.assert_array_equal(experts[:, :4], of(old, kind, EXPERTS))
    np.testing.assert_array_equal(gate[..., :4], of(old, kind, GATE))
    assert experts.shape[1] == 7 == gate.shape[-1]
    assert not experts[:, 4:].any() and not gate[..., 4:].any()
    assert not of(new, kind, GATE.replace("kernel_DE", "bias_E")).any()
  assert not any("embed.embedding" in path for path in new.optimizer)  # is frozen
  said, new = made(begun, cache, tmp_path / "wide", "expand", "--times", "2")
  assert said == "go on from step 2"
  for kind in ("mu", "nu"):  # a copy's are those of what it was copied from
    np.testing.assert_array_equal(
      of(new, kind, EXPERTS), np.repeat(of(old, kind, EXPERTS), 2, axis=1)
    )


def test_what_cannot_go_on_begins_anew_and_says_why(begun, cache, tmp_path, capsys):
  own = ["--domain", "code", "--keep", "2", "--score", "random"]
  for n, (name, more, why) in enumerate(
    [
      ("extract", [*own, "--no-moments"], "--no-moments"),
      ("extract", [*own, "--set", "steps=2", "--set", "optim.warmup_steps=1"],
       "2 steps are done, and the new run has 2"),
      ("to_dense", [], "experts have become one dense layer"),
      ("extract", [*own, "--set", "optim.kind=adafactor"], "keeps other things"),
    ]
  ):  # fmt: skip
    said, new = made(begun, cache, tmp_path / str(n), name, *more)
    assert said.startswith("begin anew: ") and why in said and new.step == 0
  given = ["--workdir", str(begun[0]), "--out", str(tmp_path / "no"), "--moments"]
  assert surgery.main(["to_dense", *given, "--cache", str(cache)]) == 2
  assert "--moments: experts have become" in capsys.readouterr().err
  assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_moments_of_other_optimizers_and_of_narrow_parameters(job, kind):
  config = dataclasses.replace(job.run.optim, kind=kind)
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32)  # noqa: E731
  before = pure.Model(job.run.model, jax.tree.map(draw, dict(job.shapes)))
  change = functools.partial(pure.cut_model, kept=[[0, 2]])
  after = change(before)

  def chain(params):
    stored = states.stored(jax.tree.map(jnp.asarray, dict(params)), "bfloat16")
    return optim.optimizer(config, steps=4, params=stored)

  old, fresh = (chain(m.params).init(m.params) for m in (before, after))
  saved = {p: draw(x) if x.ndim else np.int32(7) for p, x in named(old).items()}
  if kind == "adafactor":
    with pytest.raises(ValueError, match="the optimizer keeps"):
      carried.optimizer(saved, fresh, change=change, before=before, after=after)
    return
  found = named(
    carried.optimizer(saved, fresh, change=change, before=before, after=after)
  )
  assert set(found) == set(named(fresh))
  (path,) = [p for p in saved if p.endswith(EXPERTS) and not p.startswith("master")]
  np.testing.assert_array_equal(found[path], saved[path][:, [0, 2]])
  # The copy in float32 is the new model's weight, and no moment.
  np.testing.assert_array_equal(found[f"master/{EXPERTS}"], after.params[EXPERTS])
