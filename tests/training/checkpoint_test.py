"""Checkpoints come back exactly, or not at all."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import shutil

import chex
import jax
import pytest

from experiments.checkpoint import Checkpoints, digests
from experiments.errors import BadCheckpoint

CORRUPT = r"corrupt: .* delete .*/4 to resume from step 2"
FACTS = {"config": {"optim": {"clip": 1.0}, "steps": 12}, "text": "abc"}


@pytest.fixture(scope="module")
def saved(job, tmp_path_factory):
  """A folder with checkpoints of steps 2 and 4, and what came of it unstopped."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(folder, FACTS)
  state, batches = job.init(), job.batches()
  for step in range(1, 7):
    state, _ = job.train_step(state, next(batches))
    if step in (2, 4):
      checkpoints.save(state, batches)
  checkpoints.close()
  return folder, state, list(itertools.islice(batches, 3))


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved[0], tmp_path / "copy")


def restored(job, folder, facts=FACTS):
  checkpoints, batches = Checkpoints(folder, facts), job.batches()
  try:
    return checkpoints.restore(jax.eval_shape(job.init), batches), batches
  finally:
    checkpoints.close()


def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(job, saved):
  folder, expected, following = saved
  state, batches = restored(job, folder)
  assert int(state.step) == 4
  for _ in range(2):
    state, _ = job.train_step(state, next(batches))
  assert digests(state) == digests(expected)
  chex.assert_trees_all_equal(list(itertools.islice(batches, 3)), following)


def test_an_unfinished_save_is_ignored(job, copy):
  shutil.copytree(copy / "4", copy / "6.orbax-checkpoint-tmp")
  assert int(restored(job, copy)[0].step) == 4


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_flipped_byte_is_found(job, copy, part):
  path = max((copy / "4" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
  whole = bytearray(path.read_bytes())
  whole[int(part * len(whole))] ^= 1
  path.write_bytes(whole)
  with pytest.raises(BadCheckpoint, match=CORRUPT) as caught:
    restored(job, copy)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("item", "pattern"), [("state", "d/*"), ("data", "*.json"), ("meta", "metadata")]
)
def test_a_file_cut_short_is_refused_in_one_line(job, copy, item, pattern):
  for path in (copy / "4" / item).rglob(pattern):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(BadCheckpoint, match="step 4") as caught:
    restored(job, copy)
  assert "\n" not in str(caught.value)


def test_a_moved_data_position_is_found(job, copy):
  (path,) = (copy / "4" / "data").glob("*.json")
  text = path.read_text()
  assert '"next_index": ' in text
  path.write_text(text.replace('"next_index": ', '"next_index": 1'))
  with pytest.raises(BadCheckpoint, match="the data position differs"):
    restored(job, copy)


def test_another_run_is_refused_with_the_fields_that_differ(job, saved):
  other = {"config": {"optim": {"clip": 2.0}, "steps": 13}, "text": "abc"}
  message = "config.optim.clip: 1.0 there, 2.0 here; config.steps: 12 there, 13 here"
  with pytest.raises(BadCheckpoint, match=message):
    restored(job, saved[0], other)


def test_a_foreign_folder_is_refused(job, copy):
  shutil.rmtree(copy / "4" / "meta")
  with pytest.raises(BadCheckpoint, match="no checkpoint of this program"):
    restored(job, copy)
