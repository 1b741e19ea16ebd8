"""`python -m experiments.main` as a process that can be stopped at a moment."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds; a run takes some


class Process:
  """A run of `micro`.

  Args:
    workdir: of the run.
    cache: of data sets; compiled code is kept there too, however small.
    arguments: more of them.
    devices: of the process.
    module: that is run.
  """

  def __init__(
    self,
    workdir: Path | str,
    cache: Path,
    *arguments: str,
    devices: int = 1,
    module: str = "experiments.main",
  ):
    environment = os.environ | {  # with the tests' flags, so that bits are the same
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ["--config", "micro", "--workdir", workdir, "--cache", cache, *arguments]
    self._workdir = workdir
    self._process = subprocess.Popen(
      [sys.executable, "-m", module, *map(str, command)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def signalled(self, number: int, when: Callable[[], bool]) -> tuple[int, str]:
    """`ended` after a signal, sent as soon as something holds."""
    self.until(when)
    self._process.send_signal(number)
    return self.ended()

  def until(self, when: Callable[[], bool]) -> None:
    """Waits until something holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not when() and self._process.poll() is None:
      if time.monotonic() > deadline:
        self._gives_up("what is waited for did not come")
      time.sleep(0.001)

  def killed(self, when: Callable[[], bool]) -> bool:
    """SIGKILL as soon as something holds; False if the run was over before."""
    return self.signalled(signal.SIGKILL, when)[0] == -signal.SIGKILL

  def ended(self) -> tuple[int, str]:
    """The exit code and all that was printed."""
    try:
      output, _ = self._process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
      self._gives_up("it did not end")
    return self._process.returncode, output

  def _gives_up(self, why: str) -> NoReturn:
    """Leaves no process behind that would slow other tests down."""
    self._process.kill()
    output, _ = self._process.communicate()
    raise AssertionError(f"{why} in {PATIENCE} s; the process said: {output}")


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
  """The whole lines of a file."""
  path = workdir / name
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.splitlines(keepends=True) if "\n" in line]


def steps(workdir: Path) -> int:
  """How many are listed."""
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def unfinished(workdir: Path) -> list[str]:
  """Saves that are under way, or were when the run was killed."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return [name for name in names if not name.isdigit()]


def summary(workdir: Path) -> dict:
  """summary.json."""
  return json.loads((workdir / "summary.json").read_text())


def events(workdir: Path) -> dict[str, list[int]]:
  """Tag -> steps, as TensorBoard shows them: file by file, purged at each start."""
  from tensorboardX.proto import event_pb2

  found: dict[str, list[int]] = {}
  for path in sorted((workdir / "tensorboard").iterdir()):
    data, place = path.read_bytes(), 0
    while place + 12 <= len(data):  # a record: its length, a checksum, it, a checksum
      length = int.from_bytes(data[place : place + 8], "little")
      event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
      place += 16 + length
      if event.HasField("session_log"):
        for tag in found:
          found[tag] = [step for step in found[tag] if step < event.step]
      for value in event.summary.value:
        found.setdefault(value.tag, []).append(event.step)
  return found
