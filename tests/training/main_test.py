"""The command line: bad input in one line, killed runs that end with the same bits."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import main
from experiments.workdir import claim, prepared

ROOT = Path(__file__).parents[2]


def outcome(*arguments) -> int:
  try:
    return main.main([str(a) for a in arguments])
  except SystemExit as stop:
    return stop.code


def old_run(job, folder):
  claim(job.run, folder)


def foreign(job, folder):
  folder.mkdir()
  (folder / "thesis.tex").write_text("mine")


def a_file(job, folder):
  folder.write_text("mine")


def nothing(job, folder):
  pass


@pytest.mark.parametrize(
  ("arguments", "before", "said"),
  [
    (["--config", "micor"], nothing, "unknown config 'micor'; did you mean 'micro'?"),
    (["--conf"], nothing, "--conf"),
    (["--config", "micro", "--set", "optim.clp=1"], nothing, "did you mean 'clip'?"),
    (["--config", "micro", "--set", "steps"], nothing, "write path=value"),
    (["--config", "micro", "--set", "steps=many"], nothing, "is a str"),
    (["--config", "micro", "--set", "steps=0"], nothing, "run.steps=0"),
    (["--config", "micro", "--set", "loss_weights=(('z', 1.0),)"], nothing, "'z'"),
    (
      ["--config", "micro", "--set", "model.segments.0.0.1.ff.router.k=5"],
      nothing,
      "k=5",
    ),
    (
      ["--config", "micro", "--set", "optim.clip=2", "--set", "steps=13"],
      old_run,
      "optim.clip: 1.0 there, 2.0 here; steps: 12 there, 13 here",
    ),
    (["--config", "micro"], foreign, "holds 'thesis.tex' but no run"),
    (["--config", "micro"], a_file, "is a file; give a folder"),
  ],
)
def test_bad_input_is_one_line_and_changes_nothing(
  job, tmp_path, capsys, arguments, before, said
):
  folder = tmp_path / "run"
  before(job, folder)
  files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  start = time.perf_counter()
  assert outcome(*arguments, "--workdir", folder, "--cache", tmp_path / "cache") == 2
  assert time.perf_counter() - start < 5  # a second on a machine that is not shared
  shown = capsys.readouterr()
  assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
  assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_a_missing_extra_is_named_with_its_pip_line(tmp_path, capsys, monkeypatch):
  found = importlib.util.find_spec
  missing = {"grain"}
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name in missing else found(name)
  )
  assert outcome("--config", "micro", "--workdir", tmp_path / "run") == 2
  message = "experiments.main needs grain; run: pip install 'jmoe[data]'"
  assert message in capsys.readouterr().err


def test_the_dense_run_has_the_same_batches_and_its_own_folder(job, tmp_path):
  (sparse, folder), (dense, below) = prepared(job.run, tmp_path, compare_dense=True)
  assert (dense.data, dense.steps) == (sparse.data, sparse.steps)
  assert below == folder / "dense" and dense.name == "micro-dense"


class Process:
  """`python -m experiments.main` as another process."""

  def __init__(self, workdir: Path, cache: Path, *arguments: str):
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ["--config", "micro", "--workdir", workdir, "--cache", cache, *arguments]
    self._metrics = workdir / "metrics.jsonl"
    self._process = subprocess.Popen(
      [sys.executable, "-m", "experiments.main", *map(str, command)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def steps(self) -> int:
    text = self._metrics.read_text() if self._metrics.exists() else ""
    return text.count("\n")

  def kill_at(self, step: int) -> bool:
    """SIGKILL once a step is listed; False if the run was over before."""
    while self.steps() < step and self._process.poll() is None:
      time.sleep(0.001)
    self._process.send_signal(signal.SIGKILL)
    self._process.communicate()
    return self._process.returncode == -signal.SIGKILL

  def ended(self) -> tuple[int, str]:
    """The exit code and all that was printed."""
    output, _ = self._process.communicate(timeout=300)
    return self._process.returncode, output


SETTINGS = ["--set", "steps=80", "--set", "save_every=9", "--set", "sample_bytes=4"]


@pytest.fixture(scope="module")
def whole(texts, cache, tmp_path_factory):
  """The folder of a run that was never stopped, and what it printed."""
  del texts  # built, so that no process has to
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  code, output = Process(workdir, cache, "--compare-dense", *SETTINGS).ended()
  assert code == 0, output
  return workdir, output


def test_a_run_ends_with_a_table_beside_gzip_and_a_sample(whole):
  workdir, output = whole
  for part in (
    "micro ",
    "micro-dense",
    "gzip -9, each alone",
    "sample of micro:\ndef ",
  ):
    assert part in output
  assert output.index("micro: ") < 1  # one line before the bar, and nothing else
  files = {path.name for path in workdir.iterdir()}
  assert files == {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "result.json",
    "dense",
  }


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_with_the_bits_of_one_never_stopped(
  whole, cache, tmp_path
):
  workdir = tmp_path / "killed"
  steps = sorted(random.Random(time.time_ns()).sample(range(1, 75), 3))
  kills = [Process(workdir, cache, *SETTINGS).kill_at(step) for step in steps]
  assert sum(kills) >= 2, steps
  code, output = Process(workdir, cache, *SETTINGS).ended()
  assert code == 0, output
  expected = json.loads((whole[0] / "result.json").read_text())
  assert json.loads((workdir / "result.json").read_text()) == expected, steps
  listed = [json.loads(s)["step"] for s in (workdir / "metrics.jsonl").open()]
  assert listed == list(range(1, 81)), steps


def test_a_corrupt_checkpoint_is_one_line_and_stays(whole, cache, tmp_path):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  data = (workdir / "checkpoints" / "80" / "state").rglob("d/*")
  path = max(data, key=lambda p: p.stat().st_size)
  flipped = bytearray(path.read_bytes())
  flipped[len(flipped) // 2] ^= 1
  path.write_bytes(flipped)
  code, output = Process(workdir, cache, *SETTINGS).ended()
  assert code == 2 and output.count("\n") == 1, output
  assert "step 80 is corrupt" in output and "to resume from step 72" in output
  assert path.read_bytes() == flipped
