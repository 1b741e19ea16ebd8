"""Sweeps over a stand-in for the training job, which takes milliseconds a cell."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import configs, sweep
from experiments.settings import with_settings
from experiments.sweeping import cells as sweeping_cells, run as sweeping_run
from experiments.workdir import claim
from jmoe.use import to_jsonable

# Does what `experiments.main` promises: says whose the folder is, goes on where it
# stopped, leaves what it has at SIGTERM, and a summary at the end.
STAND_IN = """
import json, os, pathlib, shutil, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--workdir") + 1])
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(pathlib.Path(os.environ["CLAIMS"]) / (folder.name + ".json"),
            folder / "config.json")
(folder / "command.json").write_text(json.dumps(words))
(folder / "leads").write_text(str(os.getsid(0) == os.getpid()))
def step():
  with (folder / "metrics.jsonl").open("a") as file:
    file.write("{}\\\\n")
def stop(*_):
  step()
  sys.exit(143)
signal.signal(signal.SIGTERM, stop)
step()
print("trains", flush=True)
behaviour = json.loads(pathlib.Path(os.environ["CLAIMS"], "behaviour.json").read_text())
does = behaviour.get(folder.name)
if does == "fail":
  sys.exit(3)
if does == "wait":
  time.sleep(60)
if does != "forget":
  (folder / "summary.json").write_text(json.dumps({"finished": True}))
"""

MICRO = ("--config", "micro", "--seeds", "0,1", "--set", "steps=9")
GRID = ("--grid", "optim.clip=1,2")
NAMES = [f"micro,optim.clip={clip},seed={seed}" for clip in (1, 2) for seed in (0, 1)]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """Makes `sweep` run the stand-in; returns how to say what a cell does."""
  claims = tmp_path / "claims"
  claims.mkdir()
  script = tmp_path / "stand_in.py"
  script.write_text(STAND_IN.replace("\\\\", "\\"))
  command = sweeping_run.command

  def instead(cell, cache):
    run = with_settings(configs.load(cell.config), cell.settings)
    (claims / f"{cell.name}.json").write_text(json.dumps(to_jsonable(run)))
    python, dash_m, module, *words = command(cell, cache)
    assert (python, dash_m, module) == (sys.executable, "-m", "experiments.main")
    return [python, str(script), *words]

  monkeypatch.setattr(sweeping_run, "command", instead)
  monkeypatch.setattr(sweeping_run, "_SECONDS", 0.01)
  monkeypatch.setenv("CLAIMS", str(claims))

  def behave(**does):
    (claims / "behaviour.json").write_text(json.dumps(does))

  behave()
  return lambda does: behave(**does)


def outcome(capsys, *arguments) -> tuple[int, str, str]:
  try:
    code = sweep.main([str(a) for a in arguments])
  except SystemExit as stop:
    code = stop.code
  shown = capsys.readouterr()
  return code, shown.out, shown.err


def starts(out) -> dict[str, int]:
  """How often each cell was begun."""
  return {p.parent.name: p.read_text().count("\n") for p in out.glob("*/metrics.jsonl")}


def test_every_cell_runs_once_in_its_own_folder(stand_in, tmp_path, capsys):
  out = tmp_path / "out"
  arguments = (*MICRO, *GRID, "--out", out, "--cache", tmp_path / "cache")
  code, printed, _ = outcome(capsys, *arguments)
  assert code == 0 and printed.endswith("4 of 4 cells are finished\n")
  assert starts(out) == dict.fromkeys(NAMES, 1)
  words = json.loads((out / NAMES[3] / "command.json").read_text())
  settings = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
  assert settings == ["steps=9", "optim.clip=2", "seed=1"]
  assert words[words.index("--cache") + 1] == str(tmp_path / "cache")
  # Ctrl-C reaches the sweep alone, which then asks the cell once.
  assert (out / NAMES[3] / "leads").read_text() == "True"
  # Nothing is left to do, and nothing is done.
  code, printed, _ = outcome(capsys, *arguments)
  assert code == 0 and "4 of 4 cells are finished already" in printed
  assert starts(out) == dict.fromkeys(NAMES, 1)


@pytest.mark.parametrize("jobs", [1, 3])
def test_failures_are_listed_and_do_not_stop_the_rest(stand_in, tmp_path, capfd, jobs):
  out = tmp_path / "out"
  stand_in({NAMES[0]: "fail", NAMES[2]: "forget"})
  arguments = (*MICRO, *GRID, "--out", out, "--jobs", jobs)
  code, printed, _ = outcome(capfd, *arguments)
  assert code == 1 and "2 of 4 cells are finished\n" in printed
  failures = printed[printed.index("2 of 4") :].splitlines()[1:]
  assert failures[0].startswith(f"failed: {NAMES[0]}: exit code 3")
  assert failures[1].startswith(f"failed: {NAMES[2]}: ended well, but its summary")
  # Several at a time do not write over each other.
  assert printed.count("trains") == (4 if jobs == 1 else 0)
  logs = {path.name for path in out.glob("*.log")}
  assert logs == (set() if jobs == 1 else {f"{name}.log" for name in NAMES})
  stand_in({})
  code, printed, _ = outcome(capfd, *arguments)
  assert code == 0 and f"[1/4] {NAMES[0]}, which goes on" in printed
  assert starts(out) == dict(zip(NAMES, (2, 1, 2, 1), strict=True))


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_lets_cells_save_and_the_same_command_goes_on(
  stand_in, tmp_path, capsys, number, code
):
  out = tmp_path / "out"
  stand_in({NAMES[1]: "wait"})
  waits = out / NAMES[1] / "metrics.jsonl"

  def send():
    for _ in range(3000):
      time.sleep(0.01)
      if waits.exists() and waits.stat().st_size:  # the second cell waits
        os.kill(os.getpid(), number)
        return

  threading.Thread(target=send, daemon=True).start()
  found, printed, _ = outcome(capsys, *MICRO, *GRID, "--out", out)
  assert found == code and "the same command goes on" in printed
  # It was asked once, had the time to write, and nothing was begun after it.
  assert starts(out) == {NAMES[0]: 1, NAMES[1]: 2}
  stand_in({})
  assert outcome(capsys, *MICRO, *GRID, "--out", out)[0] == 0
  assert starts(out) == dict(zip(NAMES, (1, 3, 1, 1), strict=True))


def test_a_dry_run_lists_cells_and_writes_nothing(stand_in, tmp_path, capsys):
  out = tmp_path / "out"
  code, printed, _ = outcome(capsys, *MICRO, *GRID, "--out", out, "--dry-run")
  assert code == 0 and not out.exists()
  assert [line.split() for line in printed.splitlines()] == [
    [str(n), "new", str(out / name)] for n, name in enumerate(NAMES)
  ]
  stand_in({NAMES[1]: "forget"})
  outcome(capsys, *MICRO, "--grid", "optim.clip=1", "--out", out)
  _, printed, _ = outcome(capsys, *MICRO, *GRID, "--out", out, "--dry-run")
  states = [line.split()[1] for line in printed.splitlines()]
  assert states == ["finished", "stopped", "new", "new"]


def test_the_array_job_runs_one_cell_a_task(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  out = pathlib.Path("o u't")
  script = tmp_path / "sweep.sbatch"
  grid = ("--grid", "optim.role_factors=(),(('gate', 0.1),)")  # to be quoted
  code, printed, err = outcome(
    capsys, *MICRO, *grid, "--out", out, "--slurm", script, "--jobs", 2,
    "--sbatch=--gres=gpu:1",
  )  # fmt: skip
  assert code == 0, err
  assert "array of 4 tasks" in printed
  text = script.read_text()
  assert "#SBATCH --array=0-3%2\n" in text and "#SBATCH --gres=gpu:1\n" in text
  assert out.is_dir()  # sbatch needs it for its output
  subprocess.run(["bash", "-n", script], check=True)
  folder = out / "micro,optim.role_factors=_gate_0.1_,seed=0"
  run = with_settings(
    configs.load("micro"), ["steps=9", "optim.role_factors=(('gate', 0.1),)", "seed=0"]
  )
  claim(run, folder)
  (folder / "summary.json").write_text('{"finished": true}')
  # As SLURM would run the third task, from anywhere, but for its last word.
  listed = text.replace('"$SLURM_ARRAY_TASK_ID"', '"$SLURM_ARRAY_TASK_ID" --dry-run')
  assert listed != text
  done = subprocess.run(
    ["bash", "-s"],
    input=listed,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    | {"SLURM_ARRAY_TASK_ID": "2"},
    cwd="/",
    capture_output=True,
    text=True,
    check=True,
  )
  (line,) = done.stdout.splitlines()
  assert line.split(maxsplit=2) == ["0", "finished", str(folder)]


def test_a_task_of_the_array_runs_its_cell_and_no_other(stand_in, tmp_path, capsys):
  out = tmp_path / "out"
  code, printed, _ = outcome(capsys, *MICRO, *GRID, "--out", out, "--cell", 2)
  assert code == 0 and starts(out) == {NAMES[2]: 1}
  assert "[1/1]" in printed


def test_commas_in_brackets_belong_to_a_value(tmp_path):
  found = sweeping_cells.cells(
    ["micro", "tiny"],
    seeds="3",
    settings=[],
    grids=["loss_weights=(('load_balance',1.0),),()", "steps=90,91"],
    out=str(tmp_path),
  )
  assert len(found) == 2 * 2 * 2
  assert found[1].settings == (
    "loss_weights=(('load_balance',1.0),)", "steps=91", "seed=3"
  )  # fmt: skip


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--config", "micor"], "--config micor: unknown config; did you mean 'micro'?"),
    (["--config", "micro", "--seeds", "0,x"], "--seeds 0,x: give integers"),
    (["--config", "micro", "--seeds", "1,1"], "two cells are 'micro,seed=1'"),
    (["--config", "micro", "--grid", "optim.clip"], "write path=value,value"),
    (["--config", "micro", "--grid", "optim.clip=1,,2"], "write path=value,value"),
    (["--config", "micro", "--grid", "seed=1,2"], "give --seeds 1,2 instead"),
    (["--config", "micro", "--set", "seed=3"], "--set seed=3: give --seeds 3 instead"),
    (["--config", "micro", "--grid", "steps=4", "--grid", "steps=5"], "given twice"),
    (["--config", "micro", "--grid", "optim.clp=1"], "did you mean 'clip'?"),
    (["--config", "micro", "--set", "steps=0"], "run.steps=0"),
    (["--config", "micro", "--grid", f"prompt={'x' * 300}"], "name of 3"),
    (["--config", "micro", "--jobs", "0"], "--jobs 0: give 1 or more"),
    (["--config", "micro", "--cell", "1"], "--cell 1: give 0 to 0"),
    (["--config", "micro", "--sbatch=-p"], "--sbatch is for --slurm"),
    (["--config", "micro", "--slurm", "x", "--cell", "0"], "leave out --cell"),
    (["--config", "micro", "--slurm", "x", "--sbatch", "gpu"], "write one option"),
    ([], "--config"),
  ],
)
def test_bad_input_is_one_line_and_starts_nothing(
  tmp_path, capsys, monkeypatch, arguments, said
):
  monkeypatch.chdir(tmp_path)
  out = tmp_path / "out"
  code, printed, err = outcome(capsys, *arguments, "--out", out)
  assert (code, printed, err.count("\n")) == (2, "", 1), err
  assert said in err and not out.exists() and list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_refused_before_anything_runs(
  stand_in, tmp_path, capsys
):
  out = tmp_path / "out"
  assert outcome(capsys, *MICRO, "--out", out)[0] == 0
  code, _, err = outcome(capsys, *MICRO, "--set", "steps=10", "--out", out)
  assert code == 2 and "steps: 9 there, 10 here" in err and err.count("\n") == 1
  assert set(starts(out).values()) == {1}
