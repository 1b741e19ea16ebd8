"""Folders that are there as a whole or not at all, also with several processes."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".unfinished-"
_STALE = 24 * 3600  # seconds


@contextlib.contextmanager
def whole(folder: Path, *, alone: bool = False) -> Iterator[Path]:
  """An empty folder beside this one, which becomes it in the end.

  What a killed process left there, a day ago or longer, is removed.

  Args:
    folder: not there yet; if another process makes it meanwhile, that one stays.
    alone: then it is an error, since the other one's is not the same.

  Raises:
    OSError: it cannot be written; nothing is left of it.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  for left in folder.parent.glob(f"{_PREFIX}*"):
    with contextlib.suppress(OSError):  # another process was faster
      if left.stat().st_mtime < time.time() - _STALE:
        shutil.rmtree(left)
  unfinished = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent))
  try:
    yield unfinished
    try:
      os.rename(unfinished, folder)
    except OSError:
      if alone or not folder.exists():  # else another process made the same
        raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
