"""Ctrl-C and SIGTERM as a wish to stop, which the loop grants between two steps."""
# SPDX-License-Identifier: Apache-2.0

import signal
import threading
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """While entered, the first of these signals is noted; the second acts as always.

  Outside the main thread nothing can be caught, and nothing is.
  """

  def __init__(self):
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @property
  def requested(self) -> bool:
    """Whether a signal came."""
    return self.signal is not None

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():
      for number in _CAUGHT:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    self._restore()  # so that a second one stops at once

  def _restore(self) -> None:
    while self._before:
      number, handler = self._before.popitem()
      signal.signal(number, handler)
