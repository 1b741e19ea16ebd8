"""The corpus, its data set on disk, and the batches made of it."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import os

import chex
import numpy as np
import pytest

from experiments import corpora, data, dataset, tokens
from experiments.config import Data
from experiments.errors import BadData
from experiments.vocabulary import Bytes
from experiments.whole import whole

BOS, EOS = Bytes.bos, Bytes.eos


def some_data(**values):
  return Data(
    **({"max_bytes": 20_000, "seq": 32, "batch": 4, "eval_context": 16} | values)
  )


@pytest.fixture(scope="module")
def documents(job):
  found, _ = corpora.chosen(corpora.Choice("embedded", job.run.data.max_bytes))
  return corpora.split(found)


def test_the_data_set_holds_every_document_once(texts, documents):
  held = {}
  for split in ("train", "held_out"):
    for record in getattr(texts, split):
      held[record["id"].decode()] = (record["text"].decode(), split == "held_out")
  assert held == {d.id: (d.text, d.held_out) for d in documents}
  names = {
    record["id"].decode(): texts.domains[record["domain"]] for record in texts.train
  }
  assert all(name == id.partition("/")[0] for id, name in names.items())
  assert len(texts.train) + len(texts.held_out) == len(documents)
  assert len(texts.held_out) > 0
  assert texts.digest == corpora.digest(documents)


def test_a_data_set_that_lost_records_is_refused(tmp_path):
  dataset.load(tmp_path, some_data())
  (split,) = tmp_path.rglob("*train.array_record*")
  split.write_bytes(split.read_bytes()[:100])
  with pytest.raises(BadData, match="delete this folder"):
    dataset.load(tmp_path, some_data())


def test_too_little_text_to_hold_out_any_is_refused(tmp_path):
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "only.txt").write_text("the only one")
  config = some_data(corpus=f"folder:{tmp_path / 'texts'}")
  with pytest.raises(BadData, match="data.max_bytes=20000 leaves 1 .*make it larger"):
    dataset.load(tmp_path / "cache", config)


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def fail(self):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(dataset.TextDomains, "download_and_prepare", fail)
  with pytest.raises(BadData, match="No space left.*--cache"):
    dataset.load(tmp_path, some_data())
  assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  def fail(self):
    raise RuntimeError("Failed to finalize;\n write() failed: No space left on device")

  monkeypatch.setattr(dataset.TextDomains, "download_and_prepare", fail)
  with pytest.raises(BadData, match="No space left.*make room, or give") as error:
    dataset.load(tmp_path, some_data())
  assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_what_killed_builds_left_is_removed_after_a_day(tmp_path):
  old, new = (tmp_path / f".unfinished-{name}" for name in ("old", "new"))
  for folder in (old, new):
    folder.mkdir()
    (folder / "part").write_text("half")
  os.utime(old, (1, 1))
  with whole(tmp_path / "made") as unfinished:
    (unfinished / "file").write_text("all")
  assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "made"]


def test_of_two_builds_of_one_folder_the_first_stays(tmp_path):
  with whole(tmp_path / "made") as first:
    with whole(tmp_path / "made") as second:
      (second / "file").write_text("second")
    (first / "file").write_text("first")
  assert (tmp_path / "made" / "file").read_text() == "second"
  with pytest.raises(OSError, match="not empty"):
    with whole(tmp_path / "made", alone=True) as third:
      (third / "file").write_text("third")
  assert (tmp_path / "made" / "file").read_text() == "second"
  assert len(list(tmp_path.iterdir())) == 1


def test_batches_have_their_shape_and_dtype(job):
  batch = next(job.batches())
  assert set(batch) == {"inputs", "targets", "scored", "domain", "segment", "position"}
  chex.assert_shape(list(batch.values()), (4, 32))
  chex.assert_type(list(batch.values()), np.int32)


def test_equal_seeds_give_equal_batches_and_other_seeds_do_not(job):
  first, again, other = (
    list(itertools.islice(job.batches(seed), 5)) for seed in (3, 3, 4)
  )
  chex.assert_trees_all_equal(first, again)
  pairs = zip(first, other, strict=True)
  assert any((a["inputs"] != b["inputs"]).any() for a, b in pairs)


@pytest.mark.parametrize("done", [0, 1, 7, 40])
def test_a_saved_position_gives_the_batches_that_would_have_followed(job, done):
  batches = job.batches()
  for _ in range(done):
    next(batches)
  position = json.loads(json.dumps(batches.get_state()))
  expected = list(itertools.islice(batches, 10))
  resumed = job.batches()
  resumed.set_state(position)
  chex.assert_trees_all_equal(list(itertools.islice(resumed, 10)), expected)


def test_an_epoch_holds_every_window_once(texts, job):
  text = b"".join(record["text"] for record in texts.train)
  found = np.zeros(256, np.int64)
  for batch in job.batches():
    targets = batch["targets"][batch["segment"] > 0]
    found += np.bincount(targets[targets < 256], minlength=256)
    if found.sum() > 0.95 * len(text):  # the next epoch begins in the last rows
      break
  assert np.all(found <= np.bincount(np.frombuffer(text, np.uint8), minlength=256))


def test_a_segment_is_a_piece_of_one_document():
  random = np.random.default_rng(0)
  lengths = random.integers(0, 70, 60)
  documents = [{"text": random.bytes(n), "domain": n % 3} for n in lengths]
  rows = 0
  windows = data.Windows(tokens.encoded(documents, Bytes()), seq=32)
  for batch in itertools.islice(data.batches(windows, batch=4, seq=32, seed=0), 40):
    for row in range(4):
      segment_S = batch["segment"][row]
      rows += int(segment_S.max()) > 1
      for segment in range(1, int(segment_S.max()) + 1):
        (inside,) = np.nonzero(segment_S == segment)
        inputs, targets, position, domain = (
          batch[name][row][inside]
          for name in ("inputs", "targets", "position", "domain")
        )
        np.testing.assert_array_equal(np.diff(inside), 1)
        np.testing.assert_array_equal(position, np.arange(len(inside)))
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert BOS not in inputs[1:] and EOS not in inputs
        piece = bytes(t for t in targets.tolist() if t < BOS)
        assert any(piece in d["text"] and domain[0] == d["domain"] for d in documents)
        assert len(set(domain.tolist())) == 1
  assert rows > 20  # rows of several documents


@pytest.mark.parametrize("context", [0, 16])
def test_a_pass_scores_every_byte_exactly_once(texts, encoded, context):
  windows = data.Windows(encoded.held_out, seq=32, context=context)
  found = np.zeros((len(texts.domains), 258), np.int64)
  for batch in data.one_pass(windows, batch=4, seq=32):
    chex.assert_shape(list(batch.values()), (4, 32))
    counts = (batch["scored"] > 0) & (batch["segment"] > 0)
    np.add.at(found, (batch["domain"][counts], batch["targets"][counts]), 1)
  expected = np.zeros_like(found)
  for record in texts.held_out:
    expected[record["domain"]] += np.bincount(
      Bytes().encode(record["text"])[1:], minlength=258
    )
  np.testing.assert_array_equal(found, expected)


def test_bytes_come_back_from_tokens():
  words = Bytes()
  assert words.decode(words.encode("é ok".encode())[1:].tolist()) == "é ok"
  assert words.decode([104, 105, EOS, 104]) == "hi"
