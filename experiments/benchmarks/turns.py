"""Processes that compile at once and measure one after another."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

HELP = "lock file, held while figures are taken, which other processes share"


@contextlib.contextmanager
def turn(file: Path | None) -> Iterator[None]:
  """Waits until no other process is inside with this file; None: does not wait."""
  if file is None:
    yield
    return
  with file.open("a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
