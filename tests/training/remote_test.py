"""Folders of an object store, which is one in memory here."""
# SPDX-License-Identifier: Apache-2.0

import os
import shutil
from unittest import mock

import jax
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from experiments import checkpoint, hosts, remote, workdir
from experiments.checkpoint import Checkpoints, digests
from experiments.errors import BadCheckpoint, Unreachable


class Store(MemoryFileSystem):
  """Objects by name; like s3, without folders, and nothing can be renamed."""

  protocol = "s3"
  store = {}
  pseudo_dirs = [""]
  broken = False

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("s3://").strip("/")

  def mkdir(self, path, create_parents=True, **kwargs):
    pytest.fail(f"mkdir {path}")

  makedirs = mv = mkdir

  def _open(self, path, mode="rb", **kwargs):
    if Store.broken and "w" in mode:
      raise PermissionError("not allowed\nto write")
    self.pseudo_dirs.append(self._parent(path))  # as if it were there
    return super()._open(path, mode=mode, **kwargs)


@pytest.fixture
def store(monkeypatch):
  monkeypatch.setattr(Store, "store", {})
  monkeypatch.setattr(Store, "pseudo_dirs", [""])
  local, objects = backend.fsspec_backend.fs, Store()

  def fs(path):
    return objects if os.fspath(path).startswith("s3://") else local(path)

  monkeypatch.setattr(backend.fsspec_backend, "fs", fs)
  return epath.Path("s3://bucket/runs/one")


def names():
  prefix = "/bucket/runs/one/"
  return {name.removeprefix(prefix) for name in Store.store}


def sent(place):
  place.send()
  place.wait()


def write(folder, **files):
  for name, text in files.items():
    path = folder / name.replace("__", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_local_folder_is_worked_on_where_it_is(tmp_path):
  with remote.place(epath.Path(tmp_path)) as place:
    assert place.folder == epath.Path(tmp_path)
    write(place.folder, a="1")
    sent(place)
  assert os.listdir(tmp_path) == ["a"]


def test_what_is_sent_is_found_again(store):
  with remote.place(store) as place:
    assert os.listdir(place.folder) == [] and workdir.is_local(place.folder)
    write(place.folder, **{"metrics.jsonl": "1\n", "checkpoints__3__d__x": "three"})
    write(place.folder, **{"tensorboard__events": "e", "config.json.unfinished": "{"})
    write(place.folder, **{"checkpoints__6.orbax-checkpoint-tmp__d": "six"})
    sent(place)
    first = place.folder
  assert not first.exists()
  expected = {"metrics.jsonl", "tensorboard/events"}
  expected |= {"checkpoints/3/d/x", "checkpoints/3.whole"}
  assert names() == expected
  # Checkpoints go last, and what makes them count is the very last.
  order = [name.removeprefix("/bucket/runs/one/") for name in Store.store]
  assert order[2:] == ["checkpoints/3/d/x", "checkpoints/3.whole"]
  with remote.place(store) as place:
    assert (place.folder / "metrics.jsonl").read_text() == "1\n"
    assert (place.folder / "checkpoints" / "3" / "d" / "x").read_text() == "three"
    assert os.listdir(place.folder / "checkpoints") == ["3"]


def test_the_store_follows_the_folder(store):
  with remote.place(store) as place:
    write(place.folder, checkpoints__3__d="3", checkpoints__6__d="6")
    sent(place)
    shutil.rmtree(place.folder / "checkpoints" / "3")
    write(place.folder, checkpoints__9__d="9", broken__6__d="6")
    shutil.rmtree(place.folder / "checkpoints" / "6")
    write(place.folder, checkpoints__6__e="another")
    sent(place)
  whole = {"checkpoints/6/e", "checkpoints/6.whole"}
  assert names() == whole | {"checkpoints/9/d", "checkpoints/9.whole", "broken/6/d"}
  with remote.place(store) as place:  # a name that is taken is seen to be
    assert os.listdir(place.folder / "broken") == ["6"]


def test_a_checkpoint_that_arrived_in_part_does_not_count_and_is_removed(store):
  with remote.place(store) as place:
    write(place.folder, checkpoints__3__d="3")
    sent(place)
  (store / "checkpoints" / "6" / "d").write_text("half of")
  with remote.place(store) as place:
    assert os.listdir(place.folder / "checkpoints") == ["3"]
    sent(place)
  assert names() == {"checkpoints/3/d", "checkpoints/3.whole"}


def test_only_what_has_changed_is_sent(store):
  with remote.place(store) as place:
    write(place.folder, a="1", b="2", checkpoints__3__d="3")
    sent(place)
    Store.store.clear()
    write(place.folder, b="22")
    sent(place)
  assert names() == {"b"}


def test_of_several_processes_each_sends_its_part_of_a_checkpoint(store, monkeypatch):
  monkeypatch.setattr(hosts, "_self", [0, 2])
  with remote.place(store) as first, remote.place(store) as second:
    write(first.folder, **{"metrics.jsonl": "1\n", "checkpoints__3__d__a": "a"})
    write(second.folder, other="no", checkpoints__3__d__b="b")
    (store / "checkpoints" / "3" / "d" / "c").write_text("of a state that was lost")

    def meet(what, turn, error=None):  # the other comes when there is room
      assert error is None
      if hosts.is_first() and "room" in what:
        monkeypatch.setattr(hosts, "_self", [1, 2])
        sent(second)
        assert names() == {"metrics.jsonl", "checkpoints/3/d/b"}
        monkeypatch.setattr(hosts, "_self", [0, 2])

    monkeypatch.setattr(hosts, "meet", meet)
    sent(first)
  parts = {"checkpoints/3/d/a", "checkpoints/3/d/b", "checkpoints/3.whole"}
  assert names() == {"metrics.jsonl"} | parts
  with remote.place(store) as place:  # a host that goes on has all of it
    assert (place.folder / "checkpoints" / "3" / "d" / "b").read_text() == "b"


def test_places_one_after_the_other_say_nothing_twice(store, monkeypatch):
  said = set()

  class Words:  # of a job of two, of whom the other is always here
    def key_value_set(self, key, value):
      assert key not in said, "ALREADY_EXISTS"
      said.add(key)

    def key_value_delete(self, key):
      said.discard(key)

    def blocking_key_value_get(self, key, milliseconds):
      return ""

  monkeypatch.setattr(hosts, "_self", [0, 2])
  monkeypatch.setattr(hosts, "_store", Words)
  for folder in (store, store.parent / "two"):
    with remote.place(folder) as place:
      for _ in range(3):
        sent(place)
  assert len(said) == 2 * 2  # of two parts of the last two sends


def test_processes_wait_long_for_a_copy_that_another_fetches(store, monkeypatch):
  patience = []

  def heard(turn, other, what, seconds):
    patience.append(seconds)
    return ""

  monkeypatch.setattr(hosts, "_self", [0, 2])
  monkeypatch.setattr(hosts, "_store", mock.MagicMock)
  monkeypatch.setattr(hosts, "_said", heard)
  with remote.place_of_job(store) as place:
    assert place.is_copy and patience == 2 * [hosts.BUILDING]


def test_sending_waits_until_the_save_is_whole(store):
  with remote.place(store) as place:
    place.send(ready=lambda: write(place.folder, checkpoints__3__d="3"))
    place.wait()
  assert names() == {"checkpoints/3/d", "checkpoints/3.whole"}


def test_a_store_that_cannot_be_written_is_one_line(store, monkeypatch):
  monkeypatch.setattr(Store, "broken", True)
  message = r"s3://bucket/runs/one cannot be reached \(PermissionError: not allowed\); "
  with remote.place(store) as place:
    write(place.folder, a="1")
    with pytest.raises(Unreachable, match=message + "look at its name"):
      sent(place)


def test_a_folder_of_another_run_is_refused_in_the_store_too(job, store):
  (store / "config.json").write_text('{"steps": 13}')
  with pytest.raises(ValueError, match="s3://bucket/runs/one is of another config"):
    workdir.prepared(job.run, store)
  (store / "config.json").unlink()
  (store / "thesis.tex").write_text("mine")
  with pytest.raises(ValueError, match="holds 'thesis.tex' but no run"):
    workdir.prepared(job.run, store)


def test_a_run_goes_on_from_the_store_with_the_same_bits(job, store):
  state, batches = job.init(), job.batches()
  with remote.place(store) as place:
    checkpoints = Checkpoints(place.folder / "checkpoints", {})
    for step in range(1, 5):
      state, *_ = job.train_step(state, next(batches))
      if step % 2 == 0:
        place.wait()
        checkpoints.save(state, batches)
        place.send(ready=checkpoints.wait)
    place.wait()
    checkpoints.close()
  assert {"checkpoints/2.whole", "checkpoints/4.whole"} < names()
  with remote.place(store) as place:
    checkpoints, others = Checkpoints(place.folder / "checkpoints", {}), job.batches()
    restored = checkpoints.restore(jax.eval_shape(job.init), others)
    checkpoints.close()
  assert digests(restored) == digests(state)
  expected, found = next(batches), next(others)
  assert all((found[name] == expected[name]).all() for name in expected)
  assert checkpoint.read(store / "checkpoints", step=4).step == 4
  with pytest.raises(BadCheckpoint, match="holds no checkpoint; give the folder"):
    checkpoint.read(epath.Path("s3://bucket/runs/none/checkpoints"))
