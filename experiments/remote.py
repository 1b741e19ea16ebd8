"""A run's folder in an object store, worked on in a local copy.

Objects cannot grow or be renamed, several of them never appear at once, and Orbax knows
s3:// not at all.  So a run in gs:// or s3:// works in a temporary folder, which begins
with what the store holds; what has changed is sent at every save, in the background.  A
checkpoint goes last, and counts in the store once STEP.whole lies beside it.

Of several processes each has a copy.  Into a checkpoint it writes its own part, under
names that no other has, and sends that; the first sends all else, and says that a
checkpoint is whole when all have sent theirs.
"""
# SPDX-License-Identifier: Apache-2.0

import concurrent.futures
import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator

from etils import epath

from experiments import hosts
from experiments.workdir import is_local, reaching

_FETCHED = ("metrics.jsonl", "routing.jsonl", "summary.json", "config.json")
_CHECKPOINTS = "checkpoints"
_BROKEN = "broken"
_WHOLE = ".whole"
_turns = itertools.count()  # of all places: what was said of one is not said again

_Mark = dict[str, tuple[int, int]]  # relative name -> bytes, nanoseconds of change


class Place:
  """Where a run works: its own folder if that is local, or a copy.

  Args:
    folder: to work in.
    store: where it comes from and goes to; None if it is the folder itself.

  Raises:
    Unreachable: the store cannot be read; also from `send` and `wait`, or written.
  """

  def __init__(self, folder: epath.Path, store: epath.Path | None = None):
    self.folder, self._store = folder, store
    self._files: _Mark = {}  # as they were sent, but those of checkpoints
    self._steps: dict[str, _Mark] = {}
    self._sender = concurrent.futures.ThreadPoolExecutor(1)  # no thread before a task
    self._sending: concurrent.futures.Future[None] | None = None
    if store is not None:
      with reaching(store):
        self._fetch(store)

  @property
  def is_copy(self) -> bool:
    """Whether the folder is this process's alone."""
    return self._store is not None

  @property
  def seen(self) -> epath.Path:
    """Where all processes see what was sent."""
    return self.folder if self._store is None else self._store

  def send(self, ready: Callable[[], None] = lambda: None) -> None:
    """Begins to bring the store up to the folder, once `ready` has returned.

    Every process of a job calls it.
    """
    self.wait()
    if self._store is not None:
      turn = next(_turns)
      self._sending = self._sender.submit(self._send, self._store, ready, turn)

  def wait(self) -> None:
    """Waits until all that was sent has arrived."""
    sending, self._sending = self._sending, None
    if sending is not None:
      sending.result()

  def close(self) -> None:
    """Ends what is still being sent; to know that it arrived, `wait` before."""
    self._sender.shutdown()

  def _fetch(self, store: epath.Path) -> None:
    for name in _FETCHED:
      if (store / name).exists():
        _copy(store / name, self.folder / name)
    for name in _names(store / _BROKEN):  # no second one shall have its name
      (self.folder / _BROKEN / name).mkdir(parents=True)
    there = _names(store / _CHECKPOINTS)
    for step in sorted(name for name in there if name + _WHOLE in there):
      for name in _tree(store / _CHECKPOINTS / step):
        source = store / _CHECKPOINTS / step / name
        _copy(source, self.folder / _CHECKPOINTS / step / name)
      self._steps[step] = _mark(self.folder / _CHECKPOINTS / step)

  def _send(self, store: epath.Path, ready: Callable[[], None], turn: int) -> None:
    here, there = self.folder / _CHECKPOINTS, store / _CHECKPOINTS
    steps: dict[str, _Mark] = {}
    new: list[str] = []

    def make_room() -> None:
      ready()
      found = {name: _mark(here / name) for name in _names(here) if name.isdigit()}
      steps.update(found)
      new.extend(step for step in found if self._steps.get(step) != found[step])
      if hosts.is_first():
        with reaching(store):
          self._send_files(store)
          for step in new:  # a part that arrived before would be of another state
            _removed(there, step, _names(there))

    def send_parts() -> None:
      with reaching(store):
        for step in sorted(new, key=int):
          for name in steps[step]:
            _copy(here / step / name, there / step / name)

    _by_all("making room for a checkpoint", turn, make_room)
    _by_all("sending a checkpoint", turn, send_parts)
    with reaching(store):
      if hosts.is_first():
        for step in sorted(new, key=int):
          (there / (step + _WHOLE)).write_text("all of it has arrived\n")
        found = _names(there)
        for step in {name.removesuffix(_WHOLE) for name in found} - set(steps):
          _removed(there, step, found)
    self._steps = steps

  def _send_files(self, store: epath.Path) -> None:
    for name, mark in _mark(self.folder).items():
      beside = not name.startswith(_CHECKPOINTS + "/")
      if beside and not name.endswith(".unfinished") and self._files.get(name) != mark:
        _copy(self.folder / name, store / name)
        self._files[name] = mark


@contextlib.contextmanager
def place(folder: epath.Path) -> Iterator[Place]:
  """Where to work on a folder, local or not; a copy is gone afterwards.

  Raises:
    Unreachable: the store cannot be read.
  """
  if is_local(folder):
    yield Place(folder)
    return
  with tempfile.TemporaryDirectory(prefix="jmoe-") as scratch:
    # With its name in it, so that messages can be understood.
    copy = epath.Path(scratch) / str(folder).replace("://", "/")
    copy.mkdir(parents=True)
    found = Place(copy, folder)
    try:
      yield found
    finally:
      found.close()


@contextlib.contextmanager
def place_of_job(folder: epath.Path) -> Iterator[Place]:
  """The same, once every process of a job has its own.

  Raises:
    Unreachable: the store cannot be read, or a process did not come here in time.
    PeerFailed: another process cannot read it.
  """
  with contextlib.ExitStack() as kept:
    with hosts.together("its copy of the folder", seconds=hosts.BUILDING):
      found = kept.enter_context(place(folder))
    yield found


@contextlib.contextmanager
def fetched(folder: epath.Path) -> Iterator[epath.Path]:
  """A local folder that holds what a folder of checkpoints does; for reading only.

  Raises:
    Unreachable: the store cannot be read.
  """
  with place(folder.parent) as copy:
    yield copy.folder / folder.name


def _by_all(what: str, turn: int, part: Callable[[], None]) -> None:
  """A part of what is sent that every process must end well before any goes on."""
  failed = None
  try:
    part()
  except Exception as error:  # the others wait for a word
    failed = error
  hosts.meet(what, turn, failed)


def _removed(store: epath.Path, step: str, there: set[str]) -> None:
  """Takes a checkpoint away; first of all, it no longer counts."""
  (store / (step + _WHOLE)).unlink(missing_ok=True)
  if step in there:
    (store / step).rmtree()


def _copy(source: epath.Path, target: epath.Path) -> None:
  if is_local(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  source.copy(target, overwrite=True)


def _names(folder: epath.Path) -> set[str]:
  return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _tree(folder: epath.Path) -> list[str]:
  """Relative names of all files below a folder of the store."""
  found = []
  for path in folder.iterdir():
    if path.is_dir():
      found += [f"{path.name}/{name}" for name in _tree(path)]
    else:
      found.append(path.name)
  return found


def _mark(folder: epath.Path) -> _Mark:
  """What tells the files of a local folder from what they were."""
  found = {}
  for parent, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(parent, name)
      with contextlib.suppress(FileNotFoundError):  # an unfinished one, finished now
        stat = os.stat(path)
        found[os.path.relpath(path, folder)] = (stat.st_size, stat.st_mtime_ns)
  return found
