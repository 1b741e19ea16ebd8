"""Commands that compile at once and are measured one after another, in a given order.

Nobody measures while others compile: compilers try kernels on the GPUs, and figures
that were taken meanwhile were wrong.  Only when patience is over do they, and how they
ended says so.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from experiments.benchmarks.command import command
from experiments.benchmarks.turns import Gate

_LATE = 124  # the exit code of a part that is ended, as of `timeout`


@dataclasses.dataclass(frozen=True)
class Part:
  """A command that asks for its turn with `--turn FILE` (`turns.turn`).

  Args:
    name: of its files.
    words: module and arguments.
    seconds: that its figures should take; of twice as many it is ended.
  """

  name: str
  words: tuple[str, ...]
  seconds: float

  @property
  def command(self) -> str:
    """What is run, without names of a machine's files and its cores."""
    files = ("--turn", "--out", "--threads", "--liger-site")
    return command(self.words[0], self.words[1:], without=files)


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a part ended."""

  part: Part
  code: int
  seconds: float  # since it was given its turn; of one that never asked, all
  beside: int = 0  # commands that still compiled when its turn came


class _Process:
  def __init__(self, part: Part, folder: Path, env: dict[str, str]):
    self.part, self.given, self.beside = part, False, 0
    self.gate = Gate(folder / f"{part.name}.turn")
    self.begin = time.monotonic()
    with (folder / f"{part.name}.log").open("w") as log:
      self.process = subprocess.Popen(
        [sys.executable, "-m", *part.words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | env,
        start_new_session=True,  # with all its children, to end them together
      )

  def give(self, beside: int) -> None:
    self.given, self.begin, self.beside = True, time.monotonic(), beside
    self.gate.give()

  def ended(self) -> Ended | None:
    seconds = time.monotonic() - self.begin
    if self.process.poll() is not None:
      return Ended(self.part, self.process.returncode, seconds, self.beside)
    if self.given and seconds > 2 * self.part.seconds:
      self.stop()
      return Ended(self.part, _LATE, seconds, self.beside)
    return None

  def stop(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()


def together(
  parts: Sequence[Part],
  folder: Path,
  *,
  at_once: int,
  patience: float,
  until: float,
  kept: int | None = None,
) -> Generator[Ended, None, None]:
  """How each part ended, as they end; what has not by then is stopped, and left out.

  Args:
    parts: the first are measured first.
    folder: for logs, locks and, with `kept`, compiled programs.
    at_once: processes.
    patience: seconds of compilation after which those that are ready measure.
    until: of `time.monotonic`.
    kept: processes that may wait for their turn, each with its memory.  Others end when
      they have compiled, and begin again, from jax's cache, when their turn is near.
      None: all may wait.
  """
  few = kept is not None and kept < at_once
  room = kept if few and kept is not None else at_once
  order = {part.name: i for i, part in enumerate(parts)}
  env = {} if not few else {
    "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").resolve()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }  # fmt: skip
  waiting, active, compiled = list(parts), [], set()
  begin = time.monotonic()

  def before(part: Part) -> int:
    """How many of those that are left are measured before it."""
    left = [*waiting, *(one.part for one in active)]
    return sum(order[other.name] < order[part.name] for other in left)

  try:
    while (waiting or active) and time.monotonic() < until:
      late = time.monotonic() > begin + patience
      new = [p for p in waiting if p.name not in compiled] if few and not late else []
      free = max(0, (at_once if new else room) - len(active))
      for part in (new or list(waiting))[:free]:
        waiting.remove(part)
        active.append(_Process(part, folder, env))
      active.sort(key=lambda one: order[one.part.name])
      for one in list(active):
        if ended := one.ended():
          active.remove(one)
          yield ended
        elif one.gate.asked and not one.given:
          compiled.add(one.part.name)
          if few and before(one.part) >= room:
            one.stop()
            active.remove(one)
            waiting.append(one.part)
            waiting.sort(key=lambda part: order[part.name])
      compiling = sum(not one.given and one.part.name not in compiled for one in active)
      ready = [one for one in active if one.gate.asked and not one.given]
      busy = any(one.given for one in active)
      if ready and not busy and (late or not (compiling or new)):
        ready[0].give(compiling)
      time.sleep(0.05)
  finally:
    for one in active:
      one.stop()
