"""The loop and what it writes, with steps that compute nothing."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import io
import itertools
import json
import signal
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import loop, metrics, routing
from experiments.errors import Diverged, Stopped
from experiments.signals import Stop
from tests.training.processes import events, lines


class State(NamedTuple):
  """As much of a state as the loop looks at."""

  step: int


class Diary:
  """What happened, in order."""

  def __init__(self, stop=None):
    self.events, self.stop = [], stop or Stop()

  def train_step(self, state, batch):
    self.events.append(("step", state.step + 1))
    return State(state.step + 1), {"n": state.step + 1}, None

  def report(self, step, batch, values, found):
    assert batch == step and values == {"n": step}
    self.events.append(("report", step))

  def save(self, state):
    self.events.append(("save", state.step))

  def train(self, start, steps, save_every=100, **kwargs):
    return loop.train(
      State(start),
      itertools.count(start + 1),
      train_step=self.train_step,
      steps=steps,
      save_every=save_every,
      save=self.save,
      report=kwargs.pop("report", self.report),
      stop=self.stop,
      **kwargs,
    )


def test_a_step_is_dispatched_before_the_one_before_it_is_read():
  diary = Diary()
  assert diary.train(0, 3) == State(3)
  assert diary.events == [
    *(("step", 1), ("step", 2), ("report", 1), ("step", 3), ("report", 2)),
    *(("report", 3), ("save", 3)),
  ]


def test_all_metrics_up_to_a_save_are_reported_before_it():
  diary = Diary()
  diary.train(3, 8, save_every=2)
  saves = [n for n, (what, _) in enumerate(diary.events) if what == "save"]
  assert [diary.events[n][1] for n in saves] == [4, 6, 8]
  for n in saves:
    reported = {step for what, step in diary.events[:n] if what == "report"}
    assert reported == set(range(4, diary.events[n][1] + 1))


def test_nothing_is_done_for_a_run_that_is_over():
  diary = Diary()
  assert diary.train(5, 5) == State(5) and diary.events == []


@pytest.mark.parametrize("when", ["step", "report"])
def test_a_signal_at_any_moment_stops_after_a_save(when):
  stop = Stop()

  class Interrupted(Diary):
    def train_step(self, state, batch):
      if when == "step" and batch == 4:
        stop.signal = signal.SIGTERM
      return super().train_step(state, batch)

    def report(self, step, *rest):
      if when == "report" and step == 4:
        stop.signal = signal.SIGTERM
      super().report(step, *rest)

  diary = Interrupted(stop)
  with pytest.raises(Stopped, match=r"^stopped after step \d;") as found:
    diary.train(0, 9)
  what, step = diary.events[-1]
  assert what == "save" and found.value.exit_code == 143
  assert str(found.value).startswith(f"stopped after step {step};")
  assert ("report", step) in diary.events


def test_a_signal_while_a_step_is_saved_stops_after_the_next():
  """Whoever is told that a step was saved must find it."""

  class Interrupted(Diary):
    def save(self, state):
      super().save(state)
      self.stop.signal = signal.SIGINT

  diary = Interrupted()
  with pytest.raises(Stopped, match="^stopped after step 4;") as found:
    diary.train(0, 9, save_every=3)
  assert found.value.exit_code == 130
  assert [step for what, step in diary.events if what == "save"] == [3, 4]


@pytest.fixture
def report(job, tmp_path, monkeypatch):
  """Makes reports of one run with two watched layers; its lines go to `err`."""

  def made(step, **changes):
    monkeypatch.setattr(sys, "stderr", made.err)
    some = {"watch_every": 1, "max_skipped": 2, "steps": 40} | changes
    run = dataclasses.replace(job.run, **some)
    return loop.Report(run, epath.Path(tmp_path), step=step)

  made.err = io.StringIO()
  return made


def values(step, **changes):
  return {
    "loss": 1.0 / step,
    "bits_per_byte": 2.0,
    "gradient_norm": 1.0,
    "skipped": 0.0,
    "skew": 1.0,
    "dropped": 0.0,
    "entropy": 1.0,
  } | changes


def stack(load):
  return (routing.Stack(jnp.array([load]), jnp.ones(1), {"capacity": jnp.zeros(1)}),)


BATCH = {"inputs": np.arange(4, dtype=np.int32).reshape(2, 2)}


def test_a_resumed_report_lists_no_step_twice(report, tmp_path):
  first = report(0)
  for step in range(1, 8):
    first(step, BATCH, values(step), stack([4, 4, 4, 4]))
  first.close()
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b'\xff\n{"step": 8, "lo')  # the last line is one that a kill cut short
  second = report(5)
  for step in range(6, 11):
    second(step, BATCH, values(step, loss=7.0), stack([4, 4, 4, 4]))
  second.close()
  found = lines(tmp_path)
  assert [line["step"] for line in found] == list(range(1, 11))
  assert [line["loss"] for line in found[4:6]] == [0.2, 7.0]
  assert [line["step"] for line in lines(tmp_path, "routing.jsonl")] == list(
    range(1, 11)
  )
  assert events(tmp_path)["loss"] == list(range(1, 11))
  assert events(tmp_path)["tokens_per_second"] == [*range(2, 6), *range(7, 11)]


def test_routing_is_watched_now_and_then(report, tmp_path):
  some = report(0, watch_every=3)
  for step in range(1, 8):
    some(step, BATCH, values(step), stack([1, 2, 3, 4]))
  some.close()
  found = lines(tmp_path, "routing.jsonl")
  assert [line["step"] for line in found] == [1, 3, 6]
  assert found[0]["layers"] == [
    {
      "name": "layer 1",
      "choices": 2,
      "load": [1, 2, 3, 4],
      "entropy": 1.0,
      "dropped": {"capacity": 0},
    }
  ]


def test_an_alarm_is_said_once_a_run_and_counted_in_all_sittings(report):
  first = report(0)
  for step in range(1, 9):
    first(step, BATCH, values(step, skipped=float(step == 3)), stack([8, 0, 0, 8]))
  first.close()
  counts = {"dead experts": 2, "load skew": 1, "non-finite loss": 1}
  assert first.alarms.counts == counts
  second = report(8)
  assert second.alarms.counts == first.alarms.counts and second.skipped == 1
  second(9, BATCH, values(9, skipped=1.0), stack([8, 0, 0, 8]))
  second.close()
  assert second.alarms.counts == counts | {"non-finite loss": 2}
  said = [line for line in report.err.getvalue().splitlines() if "alarm: " in line]
  assert len(said) == 3, said


def test_too_many_skipped_steps_in_a_row_end_the_run_even_over_a_resume(report):
  first = report(0)
  for step, skipped in ((1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 1.0)):
    first(step, BATCH, values(step, skipped=skipped), stack([4, 4, 4, 4]))
  first.close()
  second = report(5)
  with pytest.raises(Diverged, match=r"step 6: .* for 3 steps in a row; lower optim"):
    second(6, BATCH, values(6, skipped=1.0), stack([4, 4, 4, 4]))
  second.close()
  assert second.skipped == 5


def test_no_more_batches_are_kept_than_the_first_hundred(report, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "MOST_KEPT", 3)
  first = report(0)
  for step in range(1, 5):  # steps 1 and 3
    first(step, BATCH, values(step, skipped=float(step % 2)), stack([4, 4, 4, 4]))
  first.close()
  second = report(4)
  for step in range(5, 11):  # and 5; then 7 and 9
    second(step, BATCH, values(step, skipped=float(step % 2)), stack([4, 4, 4, 4]))
  second.close()
  kept = {path.name for path in (tmp_path / "skipped").iterdir()}
  assert kept == {f"step-{step}.npz" for step in (1, 3, 5)}
  assert second.skipped == 5


def test_lines_hold_what_any_reader_of_json_knows(tmp_path):
  some = metrics.Lines(epath.Path(tmp_path) / "lines.jsonl", [])
  record = {"step": 1, "loss": float("nan"), "layers": [{"entropy": float("-inf")}]}
  some.add(record | {"load": [1, 2]})
  some.close()
  text = (tmp_path / "lines.jsonl").read_text()
  found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert found == {
    "step": 1,
    "loss": None,
    "layers": [{"entropy": None}],
    "load": [1, 2],
  }


def test_a_profile_says_what_it_can_no_longer_trace(tmp_path, monkeypatch, capsys):
  traced = []
  profiler = loop.jax.profiler
  monkeypatch.setattr(profiler, "start_trace", lambda folder: traced.append("start"))
  monkeypatch.setattr(profiler, "stop_trace", lambda: traced.append("stop"))

  def steps_traced(first, last, done):
    traced.clear()
    profile, seen = loop.Profile(epath.Path(tmp_path), first, last, done=done), []
    for step in range(done + 1, 12):
      profile.before(step)
      if traced == ["start"]:
        seen.append(step)
      profile.after(step, ())
    return seen, capsys.readouterr().err

  assert steps_traced(5, 8, 0) == ([5, 6, 7, 8], "")
  said = "--profile 5:8: 6 steps were done before; from 7 on is traced.\n"
  assert steps_traced(5, 8, 6) == ([7, 8], said)
  said = "--profile 5:8: 9 steps were done before; none is traced.\n"
  assert steps_traced(5, 8, 9) == ([], said)
