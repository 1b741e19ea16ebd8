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
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield time.monotonic() - begin
