"""A run that is killed, stopped and damaged ends with the bits of one that never was.

One test, as its parts share runs, and each run is a process of some seconds.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import random
import signal
import time

import pytest

from experiments.signals import Stop
from tests.training.processes import (
  Process,
  events,
  lines,
  steps,
  summary,
  unfinished,
)

STEPS, EVERY = 160, 16
SETTINGS = ("--set", f"steps={STEPS}", "--set", f"save_every={EVERY}")
SETTINGS += ("--set", "watch_every=4", "--set", "sample_bytes=4")


@pytest.mark.slow
def test_a_run_killed_stopped_and_damaged_ends_as_one_that_never_was(
  texts, cache, tmp_path
):
  del texts  # built, so that no process has to
  seed = time.time_ns()
  print("seed", seed)  # shown when it fails
  draw = random.Random(seed)
  whole, workdir = tmp_path / "whole", tmp_path / "stopped"
  undisturbed = Process(whole, cache, *SETTINGS, "--compare-dense")
  undisturbed.until(lambda: steps(whole) > 0)  # the compiled step is in the cache

  def process():
    return Process(workdir, cache, *SETTINGS)

  def further(least, most):
    goal = steps(workdir) + draw.randrange(least, most)
    return lambda: steps(workdir) >= goal

  assert process().killed(further(1, 20))
  left = []
  while not left:  # a save takes a twentieth of a second: not every shot hits
    some = further(1, 10)
    assert process().killed(lambda some=some: some() and bool(unfinished(workdir)))
    left = unfinished(workdir)
  for number in (signal.SIGTERM, signal.SIGINT):
    code, output = process().signalled(number, further(3, 15))
    stopped_in_order(workdir, number, code, output)
    assert not set(left) & set(unfinished(workdir)), left
  step, damaged = flipped(workdir)
  code, output = process().ended()
  assert code == 0, output
  broken_was_passed_over(workdir, step, damaged, output)
  code, output = undisturbed.ended()
  assert code == 0, output
  printed_a_table(output)
  equal(whole, workdir)
  shows_every_step_once(workdir)
  fine_tuned(whole, cache, tmp_path)


def stopped_in_order(workdir, number, code, output):
  """A whole checkpoint of the step under way, and a message of one line."""
  step = steps(workdir)
  assert code == 128 + number, output
  said = f"\nstopped after step {step}; the same command goes on from there.\n"
  assert output.endswith(said) and "Traceback" not in output
  assert (workdir / "checkpoints" / str(step)).exists()
  assert [line["step"] for line in lines(workdir)] == list(range(1, step + 1))
  found = summary(workdir)
  assert (found["finished"], found["steps"], found["digests"]) == (False, step, {})


def flipped(workdir):
  """(step, content) of the file of the newest checkpoint that now has another byte."""
  step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
  data = (workdir / "checkpoints" / str(step) / "state").rglob("d/*")
  path = max(data, key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return step, bytes(content)


def broken_was_passed_over(workdir, step, damaged, output):
  """It was named and is kept."""
  assert f"checkpoint {workdir / 'checkpoints' / str(step)} is broken: " in output
  place = workdir / "broken" / str(step)
  assert f"moved to {place}; going on from step " in output
  assert damaged in [path.read_bytes() for path in place.rglob("d/*")]


def printed_a_table(output):
  assert output.startswith("micro: ")  # one line before the bar, and nothing else
  for part in ("\nmicro-dense: ", "micro-dense  ", "gzip -9, each alone", "\nprose "):
    assert part in output, part
  assert "\nsample of micro:\ndef " in output


def equal(whole, workdir):
  """The same bits, lines and evaluation; and no file that nobody knows."""
  same = ("digests", "bits_per_byte", "steps", "alarms", "skipped_steps", "baselines")
  expected, found = summary(whole), summary(workdir)
  assert {n: found[n] for n in same} == {n: expected[n] for n in same}
  assert found["finished"] and len(found["digests"]) > 10
  assert dense_parameters(whole) != expected["parameters"]["total"]
  evaluation = (whole / "evaluation.json").read_bytes()
  assert (workdir / "evaluation.json").read_bytes() == evaluation
  assert without_speed(lines(workdir)) == without_speed(lines(whole))
  assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
  watched = lines(workdir, "routing.jsonl")
  assert watched == lines(whole, "routing.jsonl")
  assert [line["step"] for line in watched] == [1, *range(4, STEPS + 1, 4)]
  files = {"config.json", "manifest.json", "metrics.jsonl", "routing.jsonl", "dense"}
  files |= {"checkpoints", "tensorboard", "evaluation.json", "summary.json"}
  assert set(os.listdir(whole)) == files
  kept = sorted(map(int, os.listdir(workdir / "checkpoints")))
  assert kept == [STEPS - EVERY, STEPS]


def dense_parameters(whole):
  found = summary(whole / "dense")
  assert found["parameters"]["total"] == found["parameters"]["active"]
  return found["parameters"]["total"]


def without_speed(found):
  return [{n: x for n, x in line.items() if n != "tokens_per_second"} for line in found]


def shows_every_step_once(workdir):
  """TensorBoard, in a number of tags that does not grow with experts or layers."""
  found = events(workdir)
  speed = found.pop("tokens_per_second")  # not known after one step of a sitting
  assert len(speed) == len(set(speed)) > STEPS - 10
  assert set(found) == {
    *("loss", "bits_per_byte", "gradient_norm", "skipped"),
    *("skew", "dropped", "entropy", "load_balance", "router_z"),
  }
  assert all(shown == list(range(1, STEPS + 1)) for shown in found.values())


def fine_tuned(whole, cache, tmp_path):
  """A new run begins with the model of another, and learns answers to prompts."""
  pairs = [{"prompt": f"{n} + 1 =", "answer": f" {n + 1}\n" * 40} for n in range(40)]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  data = ("--set", f"data.corpus=jsonl:{path}", "--set", f"start_from={whole}")
  code, output = Process(tmp_path / "tuned", cache, *SETTINGS, *data).ended()
  assert code == 0, output
  found, first = lines(tmp_path / "tuned"), lines(whole)[0]
  assert found[0]["bits_per_byte"] < first["bits_per_byte"] - 1
  assert found[-1]["bits_per_byte"] < found[0]["bits_per_byte"] - 1
  assert summary(tmp_path / "tuned")["data"]["corpus"] == f"jsonl:{path}"


def test_the_first_signal_is_noted_and_the_second_acts_as_always():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
