"""The processes of a job: what each must know of the others before all go on.

Everything here passes through the key-value store of `jax.distributed`, with a time
limit, and touches no device: a process that found an error, or has died, is a message
on every other one, and no collective that never returns.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from experiments.address import Address
from experiments.errors import BadConfig, PeerFailed, Unreachable
from experiments.signals import Stop

_T = TypeVar("_T")
PATIENCE = 300  # seconds that a process waits for the others
BUILDING = 4 * 3600  # and where one may build a data set, or fetch a checkpoint
_LOOK = 2.0  # seconds between two looks whether another has failed
_FAILED, _STOP = "jmoe/failed", "jmoe/stop"
SIGHT = 30  # seconds that it waits for a file of theirs
_turns = itertools.count()  # all processes exchange in one order
_self = [0, 1]  # the number of this process, and how many there are
_ended = [False]  # whether all of them end by an error that they know


def start(at: Address) -> None:
  """Joins the processes of a job; before anything asks jax for devices.

  Raises:
    Unreachable: the others did not come, or nothing tells who they are.
    PeerFailed: they are not as many as was said.
  """
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      at.coordinator, at.processes, at.process, initialization_timeout=PATIENCE
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    raise Unreachable(
      f"--distributed: the processes of the job cannot be joined ({reason}); give "
      "--coordinator HOST:PORT --processes N --process I, and start all of them."
    ) from error
  _self[:] = jax.process_index(), jax.process_count()
  with together("number of processes"):
    if at.processes not in (None, jax.process_count()):
      raise PeerFailed(
        f"--processes {at.processes}, but the job has {jax.process_count()}; give "
        "every process the same number."
      )


def index() -> int:
  """The number of this process; asks no device."""
  return _self[0]


def count() -> int:
  """How many there are."""
  return _self[1]


def is_first() -> bool:
  """Whether this is the process that prints, and writes what is written once."""
  return index() == 0


def exchange(what: str, value: str, *, seconds: float = PATIENCE) -> list[str]:
  """What each process gave, in their order; every process calls it in the same place.

  Args:
    what: it is, for the message.
    value: of this process.
    seconds: to wait for the others.

  Raises:
    Unreachable: a process did not come here in time.
    PeerFailed: a process ended with an error.
  """
  if count() == 1:
    return [value]
  turn = next(_turns)
  _store().key_value_set(f"jmoe/{turn}/{index()}", value)
  if turn > 1:  # all that have said the last have heard the one before
    _store().key_value_delete(f"jmoe/{turn - 2}/{index()}")
  return [_said(turn, other, what, seconds) for other in range(count())]


def meet(what: str, turn: int, error: Exception | None = None) -> None:
  """Waits until every process is here too; for a thread beside the one that exchanges.

  Args:
    what: they have done, for the message.
    turn: how often they have met before, for this or else; the same on all.
    error: why this one has not; raised, and told to the others, who raise it too.
  """
  if count() > 1:
    key = f"{what} {turn}"
    said = "" if error is None else _line(error)
    _store().key_value_set(f"jmoe/{key}/{index()}", said)
    if turn > 1:  # all that met the last time have heard the one before
      _store().key_value_delete(f"jmoe/{what} {turn - 2}/{index()}")
    for other in range(count()) if error is None else ():
      if message := _said(key, other, what, BUILDING):
        raise PeerFailed(f"process {other}: {message}")
  if error is not None:
    raise error


def _said(turn: int | str, other: int, what: str, seconds: float) -> str:
  end = time.monotonic() + seconds
  while True:
    rest = min(max(end - time.monotonic(), 0.001), _LOOK)
    try:
      key = f"jmoe/{turn}/{other}"
      return _store().blocking_key_value_get(key, int(1000 * rest))
    except Exception as error:  # jaxlib's own, of several kinds
      if message := _tried(_FAILED):
        raise PeerFailed(message) from error
      if time.monotonic() >= end:
        raise Unreachable(
          f"process {other} of {count()} said nothing about {what} for {seconds:.0f} "
          "s; see its own output."
        ) from error
      if not any(code in str(error) for code in ("DEADLINE", "timed out")):
        time.sleep(0.1)  # no wait that has ended, so the next may end at once too


@contextlib.contextmanager
def together(what: str, *, seconds: float = PATIENCE) -> Iterator[None]:
  """A part that all processes must end well before any goes on.

  Args:
    what: it does, for the message.
    seconds: that the first to end waits for the last.

  Raises:
    PeerFailed: another process raised here; its message.
    Whatever this one raised.
  """
  mine: Exception | None = None
  try:
    yield
  except Exception as error:
    mine = error
    if count() == 1:
      raise
  said = exchange(what, "" if mine is None else _line(mine), seconds=seconds)
  _ended[0] = any(said)
  if mine is not None:
    raise mine
  for other, message in enumerate(said):
    if message:
      raise PeerFailed(f"process {other}: {message}")


def leave(code: int, error: BaseException) -> int:
  """The exit code, on a process whose error all know; another says it and ends here.

  Python's own exit would wait for the others, and they for this process.
  """
  if count() > 1 and not _ended[0]:
    with contextlib.suppress(Exception):  # another was first, or none is left
      _store().key_value_set(_FAILED, f"process {index()}: {_line(error)}")
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2 * _LOOK)  # the first process keeps the store
    os._exit(code)
  return code


def first(what: str, make: Callable[[], _T]) -> _T:
  """The same of each process, the first one's made before those of the others.

  What it leaves in a folder that all of them see, they find there.
  """
  made: Any = None
  for turn in (True, False):
    with together(what, seconds=BUILDING):
      if is_first() == turn:
        made = make()
  return made


def share(what: str, value: Any) -> Any:
  """The first process's value, which JSON can hold, on all of them."""
  return json.loads(exchange(what, json.dumps(value) if is_first() else "null")[0])


def check_visible(path: Any, argument: str) -> None:
  """Raises unless a file that the first process wrote comes into sight.

  Args:
    path: of the file; file systems of networks may take some seconds to show it.
    argument: that names its folder, for the message.

  Raises:
    BadConfig: it does not, in `SIGHT` seconds.
  """
  deadline = time.monotonic() + SIGHT
  while not path.exists():
    if time.monotonic() > deadline:
      raise BadConfig(
        f"{argument} {path.parent}: process {index()} does not see what process 0 "
        "wrote there; give a folder that all hosts share."
      )
    time.sleep(0.1)


def check_equal(values: Mapping[str, str | None], remedy: str) -> None:
  """Raises unless all values are the same on every process.

  Raises:
    PeerFailed: they are not, on all of them.
  """
  each = [json.loads(x) for x in exchange("its inputs", json.dumps(dict(values)))]
  for other, its in enumerate(each):
    for name, value in its.items():
      if value != each[0][name]:
        raise PeerFailed(
          f"{name} of process {other} is {str(value)[:60]}, that of process 0 is "
          f"{str(each[0][name])[:60]}; {remedy}"
        )


class SharedStop(Stop):
  """A signal of one process stops all of them, after the same step."""

  def __init__(self):
    super().__init__()
    self._at: int | None = None

  def asked(self, step: int) -> bool:
    """Whether to stop after this step; every process asks at each.

    A process asks about a step after it has read the metrics of the one before, for
    which all have dispatched that.  So what is said here before step n+1 is dispatched
    is heard by all when they ask about step n+2.
    """
    if self._at is None:
      if self.signal is not None:
        with contextlib.suppress(Exception):  # another was first
          _store().key_value_set(_STOP, json.dumps([step + 2, self.signal]))
      if text := _tried(_STOP):
        self._at, self.signal = json.loads(text)
    return self._at is not None and step >= self._at


def _tried(key: str) -> str | None:
  """What is under a key; None if it is not there."""
  try:
    return _store().key_value_try_get(key)
  except Exception:  # jaxlib's own
    return None


def _store() -> Any:
  # jax has no public name for it: its own checks of several hosts are collectives.
  from jax._src import distributed

  return distributed.global_state.client


def _line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
