"""Checkpoints come back exactly, or are named and passed over."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import itertools
import json
import random
import shutil
import sys
import time
import types

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import checkpoint, late_reads
from experiments.checkpoint import Checkpoints, digests
from experiments.digests import of_json
from experiments.errors import BadCheckpoint

FACTS = {"config": {"optim": {"clip": 1.0}, "steps": 12}, "text": "abc"}


@pytest.fixture(scope="module")
def saved(job, tmp_path_factory):
  """A folder with steps 2 and 4; digests of states 2, 4 and 6; batches after 6."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(folder, FACTS)
  state, batches = job.init(), job.batches()
  expected = {}
  for step in range(1, 7):
    state, *_ = job.train_step(state, next(batches))
    if step % 2 == 0:
      expected[step] = digests(state)
    if step in (2, 4):
      checkpoints.save(state, batches)
  checkpoints.close()
  return folder, expected, list(itertools.islice(batches, 3))


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved[0], tmp_path / "run" / "checkpoints")


def restored(job, folder, facts=FACTS):
  checkpoints, batches = Checkpoints(folder, facts), job.batches()
  try:
    return checkpoints.restore(jax.eval_shape(job.init), batches), batches
  finally:
    checkpoints.close()


def flip(path, place):
  whole = bytearray(path.read_bytes())
  whole[place % len(whole)] ^= 1
  path.write_bytes(whole)


def biggest(folder):
  files = [path for path in folder.rglob("d/*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(job, saved):
  folder, expected, following = saved
  state, batches = restored(job, folder)
  assert int(state.step) == 4
  for _ in range(2):
    state, *_ = job.train_step(state, next(batches))
  assert digests(state) == expected[6]
  chex.assert_trees_all_equal(list(itertools.islice(batches, 3)), following)


def test_multiples_stay_beside_the_last_two(job, tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints", FACTS, keep_every=2)
  state, batches = job.init(), job.batches()
  for step in range(1, 6):
    at = dataclasses.replace(state, step=jnp.full_like(state.step, step))
    checkpoints.save(at, batches)
  checkpoints.close()
  kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert kept == [2, 4, 5]


def test_an_unfinished_save_is_ignored_and_tidied_away(job, copy):
  shutil.copytree(copy / "4", copy / "6.orbax-checkpoint-tmp")
  assert int(restored(job, copy)[0].step) == 4
  until = time.monotonic() + 30  # Orbax removes it beside what else it does
  while (copy / "6.orbax-checkpoint-tmp").exists() and time.monotonic() < until:
    time.sleep(0.05)
  assert not (copy / "6.orbax-checkpoint-tmp").exists()


def test_the_one_before_a_broken_one_is_used(job, saved, copy, capsys):
  flip(biggest(copy / "4"), biggest(copy / "4").stat().st_size // 2)
  broken = biggest(copy / "4").read_bytes()
  state, batches = restored(job, copy)
  assert digests(state) == saved[1][2]
  said = capsys.readouterr().err
  assert f"checkpoint {copy / '4'} is broken: " in said
  assert "from the digest saved with it" in said or "cannot be read" in said
  shelf = copy.parent / "broken" / "4"
  assert f"moved to {shelf}; going on from step 2." in said
  assert biggest(shelf).read_bytes() == broken and not (copy / "4").exists()
  # It goes on from there, and its next save takes the place of the broken one.
  for _ in range(2):
    state, *_ = job.train_step(state, next(batches))
  checkpoints = Checkpoints(copy, FACTS)
  checkpoints.save(state, batches)
  checkpoints.close()
  assert digests(restored(job, copy)[0]) == saved[1][4]


def test_no_flipped_byte_of_any_file_is_restored(job, saved, copy, capsys):
  """Some bytes are in no tensor: then all that comes back is as it was."""
  draw = random.Random(0)
  files = [path for path in (copy / "4").rglob("*") if path.is_file()]
  passed_over = 0
  for path in files:
    before = path.read_bytes()
    if not before:
      continue
    flip(path, draw.randrange(len(before)))
    step = int(restored(job, copy)[0].step)
    state = restored(job, copy)[0] if step == 2 else None
    if step == 2:
      assert digests(state) == saved[1][2], path
      assert "is broken" in capsys.readouterr().err
      passed_over += 1
      shutil.move(copy.parent / "broken" / "4", copy / "4")
    else:
      assert digests(restored(job, copy)[0]) == saved[1][4], path
    path.write_bytes(before)
  assert passed_over >= 3


@pytest.mark.parametrize(
  ("item", "pattern"), [("state", "d/*"), ("data", "*.json"), ("meta", "metadata")]
)
def test_a_file_cut_short_is_passed_over(job, copy, capsys, item, pattern):
  for path in (copy / "4" / item).rglob(pattern):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert int(restored(job, copy)[0].step) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 2 and "4 is broken" in said


def test_a_missing_item_is_passed_over(job, copy):
  shutil.rmtree(copy / "4" / "meta")
  assert int(restored(job, copy)[0].step) == 2


def test_a_copy_under_another_step_is_passed_over(job, saved, copy, capsys):
  shutil.copytree(copy / "4", copy / "5")
  state, _ = restored(job, copy)
  assert digests(state) == saved[1][4]
  assert "5 is broken: it holds the state of step 4" in capsys.readouterr().err
  assert (copy.parent / "broken" / "5").exists() and not (copy / "5").exists()


def test_a_moved_data_position_is_found(job, copy, capsys):
  (path,) = (copy / "4" / "data").glob("*.json")
  text = path.read_text()
  assert '"next_index": ' in text
  path.write_text(text.replace('"next_index": ', '"next_index": 1'))
  assert int(restored(job, copy)[0].step) == 2
  assert "the data position differs" in capsys.readouterr().err


def test_a_position_written_by_an_earlier_version_is_read(job, saved, copy):
  """One reader's alone, in a file that is named after the process."""
  (path,) = (copy / "4" / "data").glob("*.json")
  position = json.loads(path.read_text())["0"]
  path.unlink()
  path.with_name("process_0-of-1.json").write_text(json.dumps(position, indent=4))
  meta = copy / "4" / "meta" / "metadata"
  body = json.loads(meta.read_text())["body"] | {"data": of_json(position)}
  meta.write_text(json.dumps({"body": body, "sha256": of_json(body)}))
  state, batches = restored(job, copy)
  assert digests(state) == saved[1][4] and batches.get_state() == position


@pytest.mark.parametrize("part", ["save", "wait_until_finished"])
def test_a_save_that_fails_is_one_line(job, copy, monkeypatch, part):
  checkpoints = Checkpoints(copy, FACTS)

  def full(*args, **kwargs):
    raise ValueError("RESOURCE_EXHAUSTED: no space\nSource locations: ...")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._manager, part, full)
    with pytest.raises(BadCheckpoint, match="no space.; make room or mend it") as error:
      checkpoints.save(job.init(), job.batches())
  assert "\n" not in str(error.value)
  checkpoints.close()


def test_if_none_is_whole_nothing_changes(job, copy):
  for step in ("2", "4"):
    flip(biggest(copy / step), biggest(copy / step).stat().st_size // 2)
  files = {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()}
  with pytest.raises(BadCheckpoint, match=r"steps 4, 2 are broken.*delete") as caught:
    restored(job, copy)
  assert "\n" not in str(caught.value)
  after = {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()}
  assert after == files


def test_another_run_is_refused_with_the_fields_that_differ(job, saved):
  other = {"config": {"optim": {"clip": 2.0}, "steps": 13}, "text": "abc"}
  message = "config.optim.clip: 1.0 there, 2.0 here; config.steps: 12 there, 13 here"
  with pytest.raises(BadCheckpoint, match=message):
    restored(job, saved[0], other)


def test_a_model_can_be_read_without_its_run(saved, copy, capsys):
  shutil.copytree(copy / "4", copy / "6.orbax-checkpoint-tmp")
  whole = checkpoint.read(copy)
  assert (copy / "6.orbax-checkpoint-tmp").exists()  # somebody may be saving it
  named = {f"params/{n}": x for n, x in whole.params.items()}
  named |= {f"balance/{n}": x for n, x in whole.balance.items()}
  expected = {n: d for n, d in saved[1][4].items() if n.split("/")[0] in ("params",)}
  assert whole.step == 4
  assert digests(named) == expected
  assert checkpoint.read(copy, step=2).step == 2
  flip(biggest(copy / "4"), biggest(copy / "4").stat().st_size // 2)
  assert checkpoint.read(copy).step == 2
  assert "4 is broken" in capsys.readouterr().err
  assert (copy / "4").exists()  # looked at, not moved
  with pytest.raises(
    BadCheckpoint, match=r"no checkpoint of step 3; steps there: 2, 4"
  ):
    checkpoint.read(copy, step=3)
  with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
    checkpoint.read(copy / "nowhere")


def test_reads_that_end_after_the_one_that_failed_say_nothing(monkeypatch):
  said = []
  monkeypatch.setattr(sys, "unraisablehook", said.append)
  late_reads.forget()
  late_reads.forget()
  for error in (RuntimeError("Event loop is closed"), RuntimeError("else"), KeyError()):
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))  # type: ignore[arg-type]
  assert [repr(x.exc_value) for x in said] == ["RuntimeError('else')", "KeyError()"]
