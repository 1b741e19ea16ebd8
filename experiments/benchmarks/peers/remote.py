"""Rows that another process times, so that two frameworks share a GPU in turn.

A process of their own rather than this one, because peers do what a benchmark must
survive: a kernel that faults takes its process's device context along, a compilation
may never end, and two frameworks in one process share whichever CUDA libraries were
loaded first.  A process that fails or outlasts its time is a row that says why.  While
one process is timed the others wait for a request, and hold no more than operands.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.peers.rows import Missing, Row

_TURN_PATIENCE = 60.0  # seconds to time it once


class Worker:
  """A process that serves one row.

  Args:
    module: full name; it has `LAYERS` of functions of torch operands, and `missing`.
    name: of the row, a key of `LAYERS`.
    shape: name of the layer's shape.
    words: how the process is started instead, from the module of `-m` on.
  """

  def __init__(self, module: str, name: str, shape: str, words: Sequence[str] = ()):
    self.name = name
    self._rest = b""
    words = words or (
      *("experiments.benchmarks.peers.worker",),
      *("--module", module, "--row", name, "--shape", shape),
    )
    self._process = subprocess.Popen(
      [sys.executable, "-m", *words],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )

  def send(self, **asked: Any) -> None:
    assert self._process.stdin is not None
    try:
      self._process.stdin.write((json.dumps(asked) + "\n").encode())
      self._process.stdin.flush()
    except OSError as error:
      raise RuntimeError(self._ended()) from error

  def receive(self, patience: float) -> dict[str, Any]:
    """The next answer.

    Raises:
      RuntimeError: the process ended, refused, or is late, after which it is ended.
    """
    assert self._process.stdout is not None
    until = time.monotonic() + patience
    while b"\n" not in self._rest:
      left = until - time.monotonic()
      if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
        self._process.kill()
        self._process.wait()
        raise RuntimeError(f"no answer in {patience:.0f} s")
      found = os.read(self._process.stdout.fileno(), 1 << 16)
      if not found:
        raise RuntimeError(self._ended())
      self._rest += found
    line, self._rest = self._rest.split(b"\n", 1)
    answer = json.loads(line)
    if answer.get("why"):
      raise RuntimeError(answer["why"])
    return answer

  def ask(self, patience: float, **asked: Any) -> dict[str, Any]:
    self.send(**asked)
    return self.receive(patience)

  def built(self, patience: float) -> Row | Missing:
    """The row, after "build" was sent; processes may build at the same time."""
    try:
      figures = self.receive(patience)["figures"]
    except RuntimeError as error:
      return Missing(self.name, str(error))

    def timed(kind: str, budget: float) -> float:
      return self.ask(_TURN_PATIENCE, do="time", kind=kind, budget=budget)["ms"]

    return Row(self.name, timed, figures)

  def close(self) -> None:
    assert self._process.stdin is not None
    self._process.stdin.close()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  def _ended(self) -> str:
    return f"its process ended with {self._process.wait()}"
