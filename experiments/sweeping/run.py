"""The cells of a sweep as processes of this machine."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from experiments import workdir
from experiments.sweeping.cells import Cell

_ROOT = pathlib.Path(__file__).parents[2]
_SECONDS = 0.2  # between two looks at the processes


class _Terminated(BaseException):
  """SIGTERM came."""


def command(cell: Cell, cache: str | None) -> list[str]:
  """Of a cell alone."""
  words = [sys.executable, "-m", "experiments.main", "--config", cell.config]
  words += ["--workdir", str(cell.folder)]
  for setting in cell.settings:
    words += ["--set", setting]
  return words + (["--cache", cache] if cache else [])


def run(cells: Sequence[Cell], *, jobs: int, cache: str | None) -> int:
  """Runs what is not finished and says what failed; returns the exit code.

  With one job at a time a cell writes to this terminal, otherwise to a file beside its
  folder.

  Raises:
    ValueError: several jobs, and folders that no file can be put beside.
  """
  if jobs > 1 and not workdir.is_local(cells[0].folder):
    raise ValueError(
      f"--jobs {jobs}: output goes to files beside {cells[0].folder}, which is not "
      "local; give --jobs 1 or a local --out."
    )
  sweep = _Sweep(cells, cache, logged=jobs > 1)
  before = signal.signal(signal.SIGTERM, _raise_terminated)
  try:
    sweep.run(jobs)
  except (KeyboardInterrupt, _Terminated) as stop:
    sweep.stop()
    print("\nstopped; the same command goes on.", flush=True)
    return 143 if isinstance(stop, _Terminated) else 130
  finally:
    signal.signal(signal.SIGTERM, before)
  return sweep.summed_up()


class _Sweep:
  """Processes that run, and how those that ran ended."""

  def __init__(self, cells: Sequence[Cell], cache: str | None, *, logged: bool):
    self._cells, self._cache, self._logged = cells, cache, logged
    self._running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}
    self._failed: dict[str, str] = {}

  def run(self, jobs: int) -> None:
    """Until none is left."""
    states = [cell.state() for cell in self._cells]
    waiting = [n for n, state in enumerate(states) if state != "finished"]
    if done := len(states) - len(waiting):
      print(f"{done} of {len(states)} cells are finished already", flush=True)
    while waiting or self._running:
      while waiting and len(self._running) < jobs:
        number = waiting.pop(0)
        goes_on = ", which goes on" if states[number] == "stopped" else ""
        name = self._cells[number].name
        print(f"[{number + 1}/{len(states)}] {name}{goes_on}", flush=True)
        self._start(self._cells[number])
      for process in [p for p in self._running if p.poll() is not None]:
        self._ended(process)
      if self._running:
        time.sleep(_SECONDS)

  def stop(self) -> None:
    """Asks all to save and waits for them; being stopped again ends them at once."""
    for process in self._running:
      process.terminate()
    try:
      for process in self._running:
        process.wait()
    except (KeyboardInterrupt, _Terminated):
      for process in self._running:
        process.kill()

  def summed_up(self) -> int:
    """Prints what failed; returns the exit code."""
    whole = len(self._cells)
    print(f"{whole - len(self._failed)} of {whole} cells are finished")
    for cell in self._cells:  # in their order, whichever ended first
      if cell.name in self._failed:
        print(f"failed: {cell.name}: {self._failed[cell.name]}")
    return 1 if self._failed else 0

  def _start(self, cell: Cell) -> None:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with contextlib.ExitStack() as files:
      output = files.enter_context(_log(cell).open("ab")) if self._logged else None
      process = subprocess.Popen(
        command(cell, self._cache),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=output,
        stderr=output,
        # Of its own, or Ctrl-C would reach it beside the signal that `stop` sends, and
        # a second one may cut its last save.
        start_new_session=True,
      )
    self._running[process] = (cell, time.perf_counter())

  def _ended(self, process: subprocess.Popen[bytes]) -> None:
    cell, start = self._running.pop(process)
    problem = None
    if process.returncode:
      problem = f"exit code {process.returncode}"
      if self._logged:
        problem += f", see {_log(cell)}"
    elif cell.state() != "finished":
      problem = "ended well, but its summary.json does not say that it is finished"
    seconds = time.perf_counter() - start
    print(f"{cell.name}: {problem or 'finished'}, after {seconds:.0f} s", flush=True)
    if problem:
      self._failed[cell.name] = problem


def _log(cell: Cell) -> pathlib.Path:
  path = pathlib.Path(str(cell.folder) + ".log")
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def _raise_terminated(*_: object) -> NoReturn:
  raise _Terminated
