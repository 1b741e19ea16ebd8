"""Processes that compile at once and measure one after another."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

HELP = "lock file, held while figures are taken, which other processes share"


@contextlib.contextmanager
def turn(file: Path | None) -> Iterator[float]:
  """Waits until no other process is inside with this file; None: does not wait.

  Yields the seconds that it waited, which limits should not count.
  """
  if file is None:
    yield 0.0
    return
  begin = time.monotonic()
  with file.open("a") as lock:
    lock.write("asked\n")  # `Gate` sees it
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield time.monotonic() - begin


class Gate:
  """A turn that is given by who started the process that asks for it.

  Args:
    file: of `turn`; made anew, and held until `give`.
  """

  def __init__(self, file: Path):
    file.unlink(missing_ok=True)
    self.file, self._lock = file, file.open("a")
    fcntl.flock(self._lock, fcntl.LOCK_EX)

  @property
  def asked(self) -> bool:
    """Whether a process waits."""
    return self.file.stat().st_size > 0

  def give(self) -> None:
    self._lock.close()
