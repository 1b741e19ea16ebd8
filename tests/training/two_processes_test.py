"""Two processes on one machine are one job: killed and resumed, equal to one process.

Gloo carries what devices exchange.  One test, as its parts share runs.
"""
# SPDX-License-Identifier: Apache-2.0

import socket
import time

import pytest
from etils import epath

from experiments import checkpoint
from experiments.checkpoint import digests
from tests.training.processes import Process, lines, steps, summary

SETTINGS = ["steps=40", "save_every=5", "data.readers=2", "sample_bytes=4"]
ARGUMENTS = [part for setting in SETTINGS for part in ("--set", setting)]
ARGUMENTS += ["--mesh", "expert=2"]


def pair(workdir, cache, *more):
  """Both processes; the second is given more arguments."""
  with socket.socket() as some:
    some.bind(("localhost", 0))
    port = some.getsockname()[1]
  place = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2"]
  return [
    Process(workdir, cache, *ARGUMENTS, *place, "--process", str(n), *more[: n * 99])
    for n in (0, 1)
  ]


def checkpoints(workdir):
  folder = workdir / "checkpoints"
  return [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_one(texts, cache, tmp_path):
  del texts  # built, so that no process has to
  whole, workdir = tmp_path / "whole", tmp_path / "two"
  first, second = pair(workdir, cache)
  assert first.killed(lambda: steps(workdir) >= 7 and bool(checkpoints(workdir)))
  second.signalled(9, lambda: True)
  assert 7 <= steps(workdir) < 40
  one = Process(whole, cache, *ARGUMENTS, devices=2)
  for process in pair(workdir, cache):
    code, output = process.ended()
    assert code == 0, output
  code, output = one.ended()
  assert code == 0, output
  assert [line["step"] for line in lines(workdir)] == list(range(1, 41))
  assert summary(workdir)["hardware"]["processes"] == 2
  found, expected = (
    checkpoint.read(epath.Path(folder) / "checkpoints") for folder in (workdir, whole)
  )
  assert found.step == expected.step == 40 and found.facts == expected.facts
  assert digests(found.params) == digests(expected.params)
  assert summary(workdir)["bits_per_byte"] == summary(whole)["bits_per_byte"]


@pytest.mark.slow
def test_processes_with_other_inputs_end_with_one_line_each(texts, cache, tmp_path):
  del texts
  start = time.monotonic()
  both = pair(tmp_path / "run", cache, "--set", "seed=1")
  for process in both:
    code, output = process.ended()
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output, output
    assert len(said) == 1 and "config of process 1 is " in said[0], output
  assert time.monotonic() - start < 60
  assert not (tmp_path / "run").exists()
