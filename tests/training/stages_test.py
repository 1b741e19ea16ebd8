"""Experiments of several stages at `micro` size: what each stage leaves, done once."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from experiments import (
  branch,
  checkpoint,
  grow,
  opening,
  optim,
  recorded,
  stages,
  state as states,
  together,
  workdir,
)
from experiments.operations._source import Source
from experiments.program import program
from tests import _cases


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the process keeps its own
  monkeypatch.setattr(Source, "sample", lambda self: None)  # receipts have own tests
  with _cases.quickly():
    yield


def params(folder):
  return recorded.read(epath.Path(folder))[2].params


def again(command, given, monkeypatch, capsys):
  """What the same command prints when all is there."""

  def trained(*_, **__):
    raise AssertionError("trained twice")

  before = capsys.readouterr().out
  monkeypatch.setattr(together, "finish", trained)
  assert command.main(given) == 0
  after = capsys.readouterr().out
  assert before.endswith(after)
  return after.splitlines()


def moved(runs, folders, reading, *, command, stop, by=0.01):
  """In place of training: a model that has gone a step of its own, and its bits."""
  del command, stop
  for n, (run, folder) in enumerate(zip(runs, folders, strict=True)):
    made = program(
      run,
      byte_lengths=reading.encoded.vocabulary.byte_lengths,
      num_domains=len(reading.texts.domains),
    )
    like = jax.eval_shape(made.init)
    if run.start_from:
      start = checkpoint.read(epath.Path(run.start_from) / "checkpoints")
      params, balance = start.params, start.balance
    else:
      draw = np.random.default_rng(run.seed).normal
      params = {
        k: np.float32(0.1) * draw(size=x.shape).astype(np.float32)
        for k, x in like.params.items()
      }
      balance = {k: np.zeros(x.shape, x.dtype) for k, x in like.balance.items()}
    frozen = optim.freeze.frozen(run.optim.freeze, like.params).names
    params = {
      k: x if k in frozen else x + np.float32(by * (n + 1)) for k, x in params.items()
    }
    key = np.zeros(2, np.uint32)
    state = states.restarted(
      dataclasses.replace(like, step=np.int32(run.steps), skipped=np.int32(0), key=key),
      params,
      balance,
      optimizer=made.optimizer,
    )
    workdir.claim(run, folder)
    saved = checkpoint.Checkpoints(
      folder / "checkpoints", opening.facts(run, reading.texts, reading.encoded)
    )
    saved.save(state, opening.training_batches(run, reading.encoded))
    saved.close()
    reading.encoded.vocabulary.save(Path(folder / "vocabulary"))
    bits = dict.fromkeys((*reading.texts.domains, "all"), n + 9.0)
    workdir.write_json(folder / "evaluation.json", {"bits_per_byte": bits})
    facts = {"data": {"digest": reading.texts.digest}, "versions": {}, "hardware": {}}
    workdir.write_json(folder / "summary.json", {"finished": True, **facts})


def test_a_model_grows_for_a_new_domain_and_its_old_experts_stay(
  texts, cache, tmp_path, monkeypatch, capsys
):
  del texts  # built
  out = tmp_path / "runs"
  given = ["--config", "micro", "--domain", "code", "--seeds", "1", "--new", "1"]
  given += ["--documents", "2", "--arms", "held=0.5", "--steps", "2"]
  given += ["--set", "steps=3", "--set", "watch_every=3", "--out", str(out)]
  given += ["--cache", str(cache)]
  train = together.finish

  def finish(runs, *rest, **more):  # the base is there at once
    return (moved if runs[0].name == "base" else train)(runs, *rest, **more)

  monkeypatch.setattr(together, "finish", finish)
  assert grow.main(given) == 0
  lines = again(grow, given, monkeypatch, capsys)
  records = [json.loads(line) for line in (out / "bits.jsonl").open()]
  assert [(r["stage"], r["seed"], r["step"]) for r in records] == [
    (stage, 1, step) for stage, step in (("base", 3), ("begun", 0), ("held=0.5", 2))
  ]
  mean = np.mean([r["bits"]["code"] for r in records if r["stage"] == "begun"])
  assert lines[1].split()[0] == "code" and f"{mean:.4f}" in lines[1]
  assert lines[-1].startswith("held=0.5: new domain") and " 1 %" in lines[-1]
  base, begun, held = (
    params(out / stage / "seed-1") for stage in ("base", "begun", "held-0.5")
  )
  for name, old in begun.items():
    same = np.asarray(old == held[name])
    if ".experts." in name:  # [repeat,E,...]
      assert same[:, :4].all() and not same[:, 4:].all(), name
      np.testing.assert_array_equal(old[:, :4], base[name])
    elif ".moe.gate." in name:
      assert same[..., :4].all() and not same[..., 4:].all(), name
    else:
      assert same.all(), name
  # What another command left is not taken for this one's.
  for own, said in (
    (["--new", "2"], "begun/seed-1 was made by another command: new: 1 there, 2 here"),
    (["--margin", "5"], "margin: 4.0 there, 5.0 here"),
    (["--steps", "1"], "held-0.5/seed-1 is of another config: steps: 2 there"),
    (["--set", "optim.clip=2.0"], "base/seed-1 is of another config: optim.clip"),
  ):
    assert grow.main([*given, *own]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and "give another --out" in error
  shutil.rmtree(out / "held-0.5")
  monkeypatch.setattr(together, "finish", moved)
  assert grow.main(given) == 0
  assert capsys.readouterr().out.splitlines()[1].split()[3] == "9.0000"
  again_records = [json.loads(line) for line in (out / "bits.jsonl").open()]
  assert again_records[:2] == records[:2] and len(again_records) == 3
  # Made again to the bit, the base is as it was; another one is not what `begun` grew.
  for by, code in ((0.01, 0), (0.02, 2)):
    shutil.rmtree(out / "base")
    monkeypatch.setattr(together, "finish", functools.partial(moved, by=by))
    assert grow.main(given) == code
  error = capsys.readouterr().err.splitlines()[-1]
  assert f"begun/seed-1 was made before {out / 'base' / 'seed-1'} was" in error


def test_experts_trained_apart_are_joined_under_a_gate(
  texts, cache, tmp_path, monkeypatch, capsys
):
  del texts
  out = tmp_path / "runs"
  given = ["--config", "micro", "--groups", "code,docstrings:prose", "--seeds", "0"]
  given += ["--joined", "joined=gate", "--steps", "2", "--joined-steps", "2"]
  given += ["--set", "steps=3", "--out", str(out), "--cache", str(cache)]
  given += ["--results", str(tmp_path / "results")]
  monkeypatch.setattr(together, "finish", moved)
  bits = dict.fromkeys(("code", "docstrings", "notices", "prose", "all"), 5.0)
  monkeypatch.setattr(
    stages.Stages, "evaluate", lambda self, stage, n, *_: self._note(stage, n, 0, bits)
  )
  assert branch.main(given) == 0
  lines = again(branch, given, monkeypatch, capsys)
  assert lines[0].split()[3:] == [
    "parent", "longer", "own", "average", "mixed", "joined=gate",
  ]  # fmt: skip
  # `own` is the branch that has the domain.
  own = [line.split()[3] for line in lines[1:] if "notices" not in line]
  assert own == ["9.0000", "9.0000", "10.0000"]
  runs = [recorded.config(epath.Path(out / f"branch-{n}" / "seed-0")) for n in (0, 1)]
  assert [run.steps for run in runs] == [2, 2]
  assert dict(runs[0].data.shares) == {"notices": 0.0, "prose": 0.0}
  assert dict(runs[1].data.shares) == dict.fromkeys(
    ("code", "docstrings", "notices"), 0
  )
  parts = [params(out / f"branch-{n}" / "seed-0") for n in (0, 1)]
  mean, joined = (params(out / s / "seed-0") for s in ("average", "joined-gate"))
  name = "segments.0.0.attention.query.kernel"
  np.testing.assert_allclose(mean[name], (parts[0][name] + parts[1][name]) / 2, 1e-5)
  np.testing.assert_array_equal(joined[name], mean[name])
  ups = joined["segments.0.0.moe.experts.up_EDF"][0]
  for e, part in enumerate(parts):
    np.testing.assert_array_equal(ups[e], part["segments.0.0.ff.up.kernel"][0])
  last = recorded.config(epath.Path(out / "joined-gate" / "seed-0"))
  assert last.data.shares is None and "expert" in last.optim.freeze
  # Claims take other seeds, from other folders: their commands name neither.
  monkeypatch.setattr(together, "finish", moved)
  other = ["--seeds", "1", "--out", str(tmp_path / "other")]
  assert branch.main([*given, *other]) == 0
  arms = json.loads((tmp_path / "results" / "branch-all.json").read_text())["arms"]
  assert {name: list(arm["values"]) for name, arm in arms.items()} == dict.fromkeys(
    ("parent", "longer", "joined=gate"), ["0", "1"]
  )
  common = "python -m experiments.branch --config micro --groups code,docstrings:prose"
  assert arms["joined=gate"]["command"] == (
    f"{common} --steps 2 --joined-steps 2 --k 2 --joined joined=gate --out runs/branch "
    "--set steps=3 --name branch"
  )
  assert arms["parent"]["command"] == arms["joined=gate"]["command"].replace(
    " --joined joined=gate", ""
  )
  # What started from a parent that was made again is refused, by its first branch.
  shutil.rmtree(out / "parent")
  monkeypatch.setattr(together, "finish", functools.partial(moved, by=0.02))
  assert branch.main(given) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert f"branch-0/seed-0 was made before {out / 'parent' / 'seed-0'} was" in error


@pytest.mark.parametrize(
  ("command", "own", "said"),
  [
    (grow, ["--domain", "cod"], "did you mean 'code'"),
    (grow, ["--domain", "code", "--arms", "grown=2"], "--arms grown=2: give"),
    (grow, ["--domain", "code", "--seeds", "0,0"], "give different whole"),
    (grow, ["--domain", "code", "--documents", "9999"], "domain 'code' has"),
    (branch, ["--groups", "code"], "give two or more"),
    (branch, ["--groups", "code:code"], "with each domain in one"),
    (branch, ["--groups", "code:prose", "--joined", "none"], "--joined none"),
  ],
)
def test_bad_input_is_one_line(texts, cache, tmp_path, capsys, command, own, said):
  del texts
  given = ["--config", "micro", "--out", str(tmp_path / "out"), "--cache", str(cache)]
  assert command.main([*given, *own]) == 2
  error = capsys.readouterr().err.strip()
  assert said in error and error.startswith("error: ") and "\n" not in error
  assert not (tmp_path / "out" / "base").exists()
