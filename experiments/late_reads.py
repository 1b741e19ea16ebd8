"""Reads of a checkpoint that end after the one that failed.

Orbax closes its event loop at the first that fails.  What the others then have to say
Python prints, a traceback for each array, between the lines that say what is broken.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import sys
from typing import Any


def forget() -> None:
  """From now on they say nothing; all else that cannot be raised is said as before.

  For good: they come as late as when the process ends.
  """
  before: Any = sys.unraisablehook
  if getattr(before, "func", None) is not _said:
    sys.unraisablehook = functools.partial(_said, before)


def _said(before: Any, unraisable: Any) -> None:
  error = unraisable.exc_value
  late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
  if not late:
    before(unraisable)
