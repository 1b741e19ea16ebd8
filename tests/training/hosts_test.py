"""What processes say to each other, with a store in place of the others."""
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import os
import signal
import threading

import jax
import pytest
from etils import epath

from experiments import handshake, hosts, joining, restoring
from experiments.errors import (
  BadCheckpoint,
  BadConfig,
  BadData,
  PeerFailed,
  Stopped,
  Unreachable,
)


class Store:
  """The key-value store of a job, whose other processes have said all they will."""

  def __init__(self):
    self.said = {}

  def key_value_set(self, key, value):
    if key in self.said:
      raise RuntimeError("ALREADY_EXISTS")
    self.said[key] = value

  def key_value_delete(self, key):
    del self.said[key]

  def key_value_try_get(self, key):
    if key not in self.said:
      raise RuntimeError("NOT_FOUND")
    return self.said[key]

  def blocking_key_value_get(self, key, milliseconds):
    if key not in self.said:
      raise RuntimeError(f"DEADLINE_EXCEEDED: {milliseconds}")
    return self.said[key]


@pytest.fixture
def store(monkeypatch):
  """That of process 1 of two; every value is in its turn, from 0."""
  made = Store()
  monkeypatch.setattr(hosts, "_store", lambda: made)
  monkeypatch.setattr(hosts, "_self", [1, 2])
  monkeypatch.setattr(hosts, "_ended", [False])
  monkeypatch.setattr(hosts, "_turns", itertools.count())
  monkeypatch.setattr(hosts, "_LOOK", 0.001)
  return made


def test_values_come_in_the_order_of_processes(store):
  store.said["jmoe/0/0"] = "a"
  assert hosts.exchange("letters", "b") == ["a", "b"]
  assert (hosts.index(), hosts.count(), hosts.is_first()) == (1, 2, False)


def test_an_error_of_one_process_is_one_of_all(store):
  store.said |= {"jmoe/0/0": "", "jmoe/1/0": "data set x cannot be read"}
  with pytest.raises(BadData, match="mine"), hosts.together("the data"):
    raise BadData("mine\nand more")
  assert store.said["jmoe/0/1"] == "mine" and hosts._ended == [True]
  message = "^process 0: data set x cannot be read$"
  with pytest.raises(PeerFailed, match=message), hosts.together("the data"):
    pass


def test_a_process_that_never_comes_is_named_in_time(store):
  message = "process 0 of 2 said nothing about the data for 0 s; see its own output"
  with pytest.raises(Unreachable, match=message):
    hosts.exchange("the data", "", seconds=0.01)


def test_a_process_that_has_ended_is_not_waited_for(store):
  store.said["jmoe/failed"] = "process 0: a disk is full"
  with pytest.raises(PeerFailed, match="process 0: a disk is full"):
    hosts.exchange("the data", "")


def test_other_inputs_are_named(store):
  theirs = {"--mesh": "data=2", "text": "abc"}
  store.said["jmoe/0/0"] = json.dumps(theirs)
  with pytest.raises(
    PeerFailed, match="--mesh of process 1 is data=4, that of process"
  ):
    hosts.check_equal(theirs | {"--mesh": "data=4"}, "give one.")


def test_what_the_first_one_does_the_others_find_done(store):
  store.said |= {"jmoe/0/0": "", "jmoe/1/0": "", "jmoe/2/0": "[3]"}
  order = []
  assert hosts.first("the data", lambda: order.append(len(store.said)) or 7) == 7
  assert order == [4]
  assert hosts.share("numbers", None) == [3]


def test_a_folder_that_only_the_first_one_sees_is_refused(store, tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, "SIGHT", 0.0)
  with pytest.raises(BadConfig, match="process 1 does not see what process 0 wrote"):
    hosts.check_visible(epath.Path(tmp_path) / "config.json", "--workdir")
  (tmp_path / "config.json").touch()
  hosts.check_visible(epath.Path(tmp_path) / "config.json", "--workdir")


@pytest.mark.parametrize(
  "mine, said", [([3], "sees checkpoints 3 there"), ([], "sees no checkpoint there")]
)
def test_other_checkpoints_than_the_first_one_sees_are_refused(
  store, tmp_path, monkeypatch, mine, said
):
  monkeypatch.setattr(hosts, "SIGHT", 0.0)
  folder = epath.Path(tmp_path) / "checkpoints"
  for step in mine:
    (folder / str(step)).mkdir(parents=True)
  store.said |= {"jmoe/0/0": "[3, 4]", "jmoe/1/0": ""}
  with pytest.raises(BadCheckpoint, match=said) as error:
    restoring.check_same(folder)
  assert "--workdir" in str(error.value) and "3, 4; give a folder" in str(error.value)
  assert "sees" in store.said["jmoe/1/1"]  # and is heard by the first one


def test_checkpoints_that_come_into_sight_are_waited_for(store, tmp_path):
  folder = epath.Path(tmp_path) / "checkpoints"
  (folder / "3").mkdir(parents=True)
  (folder / "4.orbax-checkpoint-tmp-1").mkdir()
  store.said |= {"jmoe/0/0": "[3, 4]", "jmoe/1/0": ""}
  late = threading.Timer(0.2, (folder / "4").mkdir)
  late.start()
  restoring.check_same(folder)
  late.join()


def test_processes_meet_and_hear_of_each_others_errors(store):
  store.said["jmoe/sending 0/0"] = ""
  hosts.meet("sending", 0)
  store.said["jmoe/sending 1/0"] = "a disk is full"
  with pytest.raises(PeerFailed, match="process 0: a disk is full"):
    hosts.meet("sending", 1)
  with pytest.raises(OSError, match="mine"):
    hosts.meet("sending", 2, OSError("mine\nand more"))
  assert store.said["jmoe/sending 2/1"] == "mine"
  assert "jmoe/sending 0/1" not in store.said  # all have heard it


def test_another_number_of_processes_is_refused_on_all(store, monkeypatch):
  monkeypatch.setattr(handshake, "agree", lambda *given: None)
  monkeypatch.setattr(jax.config, "update", lambda *given: None)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **keywords: None)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  store.said["jmoe/0/0"] = ""
  with pytest.raises(PeerFailed, match="--processes 3, but the job has 2; give every"):
    joining.start(joining.Job("localhost:1", 3, 1))
  assert store.said["jmoe/0/1"].startswith("--processes 3")


def test_processes_that_do_not_come_are_one_line(monkeypatch, capsys):
  came, codes = threading.Event(), []
  monkeypatch.setattr(jax.config, "update", lambda *given: None)
  monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), came.set()))

  def initialize(*given, initialization_timeout):
    assert initialization_timeout > 1  # by then the process has ended
    assert came.wait(60)
    raise RuntimeError("it has not")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(Unreachable):
    joining.start(joining.Job(wait=1))
  said = capsys.readouterr().err
  assert codes == [2] and said.count("\n") == 1
  assert "not all of the job came in 1 s" in said


def test_a_signal_stops_all_processes_after_one_step(store):
  mine, other = hosts.SharedStop(), hosts.SharedStop()
  assert not mine.asked(4) and not other.asked(4)
  mine.signal = signal.SIGTERM
  assert [mine.asked(step) for step in (5, 6, 7)] == [False, False, True]
  other.signal = signal.SIGINT  # later: the first one counts
  assert [other.asked(step) for step in (6, 7)] == [False, True]
  with pytest.raises(Stopped) as stopped:
    other.check(7)
  assert stopped.value.exit_code == 128 + signal.SIGTERM
