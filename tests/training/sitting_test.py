"""What a run does before its first step."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import os
import shutil

import numpy as np
import pytest
from etils import epath

from experiments import (
  hosts,
  job as job_of,
  loop,
  program,
  settings,
  sitting,
  vocabulary,
)
from experiments.checkpoint import Checkpoints, digests
from experiments.errors import BadCheckpoint, BadConfig, BadData
from experiments.remote import place
from experiments.signals import Stop
from experiments.sitting import Options, Sitting
from experiments.workdir import held


class Begun(Exception):
  """Training began with a state."""


@pytest.fixture
def begin(job, texts, encoded, cache, monkeypatch):
  """What a run begins with in a folder; nothing is trained, and little compiled."""

  def train(state, batches, **kwargs):
    raise Begun(state)

  def made(run, **kwargs):
    if run.model != job.run.model:
      return program.program(run, **kwargs)
    key = np.zeros(2, np.uint32)
    made = job.blueprint, job.optimizer, key, lambda key: job.init(), print, print
    return program.Program(run.model, *made)

  monkeypatch.setattr(loop, "train", train)
  monkeypatch.setattr(sitting, "program", made)

  def begun(run, folder):
    with place(epath.Path(folder)) as where, pytest.raises(Begun) as found:
      options = Options(cache)
      more = {"baselines": {}, "options": options, "stop": Stop()}
      Sitting(run, where, texts, encoded, **more).finished()
    return found.value.args[0]

  return begun


@pytest.fixture(scope="module")
def trained(job, tmp_path_factory):
  """The folder of a run, and its state after two steps."""
  folder = tmp_path_factory.mktemp("trained")
  state, batches = job.init(), job.batches()
  for _ in range(2):
    state, *_ = job.train_step(state, next(batches))
  checkpoints = Checkpoints(folder / "checkpoints", {})
  checkpoints.save(state, batches)
  checkpoints.close()
  return folder, state


def test_a_run_that_was_killed_before_its_first_save_begins_again(
  job, begin, tmp_path, capsys
):
  first = begin(job.run, tmp_path / "run")
  files = {"config.json", "manifest.json", "checkpoints", "metrics.jsonl"}
  assert set(os.listdir(tmp_path / "run")) >= files
  assert digests(begin(job.run, tmp_path / "run")) == digests(first)
  assert digests(first) == digests(job.init())


def test_a_run_starts_with_the_parameters_of_another_at_step_zero(
  job, begin, trained, tmp_path
):
  folder, state = trained
  run = dataclasses.replace(job.run, start_from=str(folder))
  found = begin(run, tmp_path / "run")
  assert int(found.step) == 0 and digests(found.params) == digests(state.params)
  assert digests(found.optimizer) == digests(job.init().optimizer)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (["start_from=nowhere"], "nowhere/checkpoints holds no checkpoint"),
    (["model.segments.0.0.0.ff.d_ff=8"], "of another shape: segments.0.0.ff.down"),
  ],
)
def test_a_start_that_cannot_be_is_one_line_and_leaves_nothing(
  job, begin, trained, tmp_path, changes, said
):
  run = dataclasses.replace(job.run, start_from=str(trained[0]))
  with pytest.raises(BadCheckpoint) as caught:
    begin(settings.with_settings(run, changes), tmp_path / "run")
  assert said in str(caught.value) and "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_a_start_with_another_vocabulary_is_refused(job, begin, tmp_path):
  other = Checkpoints(tmp_path / "other" / "checkpoints", {"vocabulary": "words"})
  other.save(job.init(), job.batches())
  other.close()
  run = dataclasses.replace(job.run, start_from=str(tmp_path / "other"))
  with pytest.raises(BadCheckpoint, match="another vocabulary than data.tokenizer='by"):
    begin(run, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_that_starts_from_another_keeps_its_vocabulary(job, texts, cache):
  model = dataclasses.replace(job.run.model, vocab_size=300)
  words = dataclasses.replace(job.run.data, tokenizer="bpe:300")
  run = dataclasses.replace(job.run, model=model, data=words)
  other = vocabulary.trained("bpe:300", [b"abcabc " * 99])
  other.save(cache / "start" / "vocabulary")
  other.save(cache / "begun" / "vocabulary")
  for start, folder in (("start", "new"), ("gone", "begun")):
    tuned = dataclasses.replace(run, start_from=str(cache / start))
    _, found = job_of.loaded(tuned, cache, epath.Path(cache / folder))
    assert found.vocabulary.digest == other.digest
  _, found = job_of.loaded(run, cache)
  assert found.vocabulary.digest != other.digest


def test_a_second_process_is_kept_out_of_a_folder(job, begin, tmp_path):
  begin(job.run, tmp_path / "run")
  files = {p: p.stat() for p in (tmp_path / "run").rglob("*")}
  with held(epath.Path(tmp_path / "run")):
    with pytest.raises(BadConfig, match="run: another process trains in it; wait"):
      begin(job.run, tmp_path / "run")
  assert {p: p.stat() for p in (tmp_path / "run").rglob("*")} == files
  begin(job.run, tmp_path / "run")


def test_checkpoints_that_this_host_cannot_list_are_one_line(begin, job, tmp_path):
  begin(job.run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  (tmp_path / "run" / "checkpoints").write_text("")
  files = set((tmp_path / "run").iterdir())
  with pytest.raises(BadCheckpoint, match=r"checkpoints cannot be read \(Not a dir"):
    begin(job.run, tmp_path / "run")
  assert set((tmp_path / "run").iterdir()) == files


def test_hosts_compare_the_checkpoints_they_see_before_one_is_read(
  begin, job, tmp_path, monkeypatch
):
  begin(job.run, tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints"
  shutil.rmtree(folder)
  (folder / "4").mkdir(parents=True)

  def of_the_first_one(what, value):  # another process, which sees step 3 alone
    return [3] if what == "its checkpoints" else value

  monkeypatch.setattr(hosts, "share", of_the_first_one)
  monkeypatch.setattr(hosts, "SIGHT", 0.0)
  with pytest.raises(BadCheckpoint, match="sees checkpoints 4 there, process 0 sees c"):
    begin(job.run, tmp_path / "run")


def test_a_summary_that_is_none_is_named(job, begin, tmp_path):
  begin(job.run, tmp_path / "run")
  path = tmp_path / "run" / "summary.json"
  for text in ("{", "[]", "{}", '{"seconds": null}'):
    path.write_text(text)
    with pytest.raises(BadData, match="summary.json is not the summary of a run; rem"):
      begin(job.run, tmp_path / "run")
    assert path.read_text() == text


def test_a_damaged_start_is_refused(job, begin, trained, tmp_path, capsys):
  place_of = trained[0] / "checkpoints" / "2" / "state"
  path = max(place_of.rglob("d/*"), key=lambda p: p.stat().st_size)
  whole = path.read_bytes()
  middle = len(whole) // 2
  path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
  run = dataclasses.replace(job.run, start_from=str(trained[0]))
  try:
    with pytest.raises(BadCheckpoint, match="steps 2 are broken.*give another run"):
      begin(run, tmp_path / "run")
  finally:
    path.write_bytes(whole)
  assert "2 is broken" in capsys.readouterr().err
  assert (trained[0] / "checkpoints" / "2").exists()
