"""Ctrl-C and SIGTERM as a wish to stop, which the loop grants between two steps."""
# SPDX-License-Identifier: Apache-2.0

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from experiments.errors import Stopped

_T = TypeVar("_T")
_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Stop:
  """While entered, the first of these signals is noted; the second acts as always.

  Outside the main thread nothing can be caught, and nothing is.
  """

  def __init__(self):
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  def asked(self, step: int) -> bool:
    """Whether to stop after this step, one of an ever larger number."""
    del step
    return self.signal is not None

  def check(self, step: int) -> None:
    """Raises `Stopped` if a signal came; this step was saved."""
    if self.signal is not None:
      raise Stopped(self.signal, step)

  def between(self, items: Iterable[_T], step: int) -> Iterator[_T]:
    """The items, as long as no signal comes; see `check`."""
    for number, item in enumerate(items, 1):
      if self.asked(step + number):
        self.check(step)
      yield item

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
