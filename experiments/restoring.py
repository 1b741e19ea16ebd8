"""The newest checkpoint that is whole, looked for from the latest one back.

`experiments.checkpoint` writes them.  Several processes read each for itself: one that
fails can then tell the others, and none waits for it in Orbax.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments import hosts, late_reads
from experiments.digests import differing, of_json
from experiments.errors import BadCheckpoint
from experiments.workdir import differences, listed

_DATA = "readers.json"


def check_readable(folder: epath.Path) -> None:
  """Raises unless this process can list the checkpoints, if there are any.

  Before Orbax, in which one process would wait for the others.

  Raises:
    BadCheckpoint: on one line.
  """
  try:
    if folder.exists():
      list(folder.iterdir())
  except OSError as error:
    raise BadCheckpoint(
      f"{folder} cannot be read ({error.strerror}); mend it, or give another --workdir."
    ) from error


def check_same(folder: epath.Path) -> None:
  """Raises, on every process, unless all see the same checkpoints.

  A process that saw none would begin anew while the others go on.

  Raises:
    BadCheckpoint, PeerFailed: they do not, `hosts.SIGHT` seconds long, as file systems
      of networks may take some to show what is there.
  """

  def steps() -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())

  theirs = hosts.share("its checkpoints", steps())
  with hosts.together("the checkpoints are seen"):
    deadline = time.monotonic() + hosts.SIGHT
    while (mine := steps()) != theirs:
      if time.monotonic() > deadline:
        raise BadCheckpoint(
          f"--workdir {folder.parent}: process {hosts.index()} sees {_listed(mine)} "
          f"there, process 0 sees {_listed(theirs)}; give a folder that all hosts "
          "share."
        )
      time.sleep(0.5)


def _listed(steps: list[int]) -> str:
  return f"checkpoints {', '.join(map(str, steps))}" if steps else "no checkpoint"


def manager_of(
  folder: epath.Path,
  *,
  ours: bool,
  shared: bool = True,
  keep_every: int | None = None,
) -> ocp.CheckpointManager:
  """Only what is ours is made, and tidied of saves that were never finished.

  What is not ours a process reads for itself, and waits for no other.

  Args:
    folder: of the checkpoints.
    ours: whether they are written.
    shared: whether all processes write into one folder; else each into its own, and
      what they wrote is a checkpoint when it is put together.
    keep_every: steps whose multiples are kept beside the last two; None: none.
  """
  if folder.exists() and not folder.is_dir():
    raise BadCheckpoint(f"{folder} is a file; give another --workdir.")
  alone: Any = ocp.options.MultiprocessingOptions()
  if not ours and hosts.count() > 1:
    me = hosts.index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"reader{me}")
  elif not shared and hosts.count() > 1:
    alone = ocp.options.MultiprocessingOptions(None)
  given = {"multiprocessing_options": alone}
  # Orbax says once for all processes that a folder is made, but here each has its own;
  # and a file for each piece of an array, as no database can be put together.
  apart: dict[str, Any] = {}
  pieces: dict[str, Any] = {}
  if not shared:
    at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
    apart, pieces = {"async_options": at_once}, {"use_ocdbt": False}
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2,
    keep_period=keep_every,
    create=ours,
    cleanup_tmp_directories=ours,
    **given,
    **apart,
  )
  handlers: dict[str, Any] = {
    "state": ocp.StandardCheckpointHandler(**given, **pieces),
    "data": ocp.JsonCheckpointHandler(_DATA, **given),
    "meta": ocp.JsonCheckpointHandler(**given),
  }
  return ocp.CheckpointManager(
    os.path.abspath(folder), options=options, item_handlers=handlers
  )


class _Broken(Exception):
  """Why a checkpoint is not whole."""


class Whole(NamedTuple):
  """What a checkpoint holds."""

  arrays: dict[str, Any]  # by path
  facts: dict[str, Any]
  positions: dict[str, Any]  # of readers


def newest_whole(
  manager: ocp.CheckpointManager,
  folder: epath.Path,
  *,
  like: Mapping[str, Any] | None = None,
  facts: dict[str, Any] | None = None,
  only: int | None = None,
  remedy: str = "delete the folder to start anew, or restore it from a copy",
) -> tuple[int, Whole, list[int]]:
  """(step, what it holds, later steps that are broken, named on stderr).

  Args:
    manager: of the folder.
    folder: for messages.
    like: shapes of what must be there, by path, for all processes together; None:
      whatever there is, for this one.
    facts: that must be those saved; None: whatever they are.
    only: the one step to look at.
    remedy: if none is whole.
  """
  steps = sorted(manager.all_steps(), reverse=True) if only is None else [only]
  broken: list[int] = []
  for step in steps:
    try:
      return step, _whole(manager, folder, step, like, facts), broken
    except _Broken as error:
      print(f"checkpoint {folder / str(step)} is broken: {error}", file=sys.stderr)
      broken.append(step)
  raise BadCheckpoint(
    f"{folder} holds no whole checkpoint (steps {', '.join(map(str, steps))} are "
    f"broken); {remedy}."
  )


def _whole(manager, folder, step, like, facts) -> Whole:
  """What one checkpoint holds, all compared with its digests.

  If it is broken for one process it is for all.
  """
  found: Whole | None = None
  error: _Broken | BadCheckpoint | None = None
  body: dict[str, Any] = {}
  try:
    body = _body(folder / str(step))
    if facts is not None and (different := differences(body["facts"], facts)):
      raise BadCheckpoint(
        f"{folder} is of another run: {listed(different)}; give another --workdir."
      )
    if like is not None:
      _check_names(folder / str(step), set(body["digests"]), set(like))
    positions = _read_positions(folder / str(step) / "data", body["data"])
    found = Whole(_arrays(manager, step, like), body["facts"], positions)
  except (_Broken, BadCheckpoint) as caught:
    error = caught
  bad = [] if error is None else ["bad"]
  if like is not None:
    bad = hosts.exchange(f"checkpoint {step}", "".join(bad))
  if error is not None:
    raise error
  if any(bad) or found is None:
    raise _Broken("another process cannot read it")
  if wrong := differing(found.arrays, body["digests"], alone=like is None):
    raise _Broken(
      f"{wrong[0]} "
      + (f"and {len(wrong) - 1} more differ" if len(wrong) > 1 else "differs")
      + " from the digest saved with it"
    )
  return found


def digest_of(folder: epath.Path) -> str:
  """Of what one checkpoint holds, as it was saved; no array is read.

  Raises:
    BadCheckpoint: its metadata is broken.
  """
  try:
    return of_json(_body(folder))
  except _Broken as error:
    raise BadCheckpoint(
      f"checkpoint {folder} is broken: {error}; restore it from a copy, or remove the "
      "run to make it again."
    ) from error


def _body(folder: epath.Path) -> dict[str, Any]:
  """The metadata of one checkpoint."""
  try:
    saved = json.loads((folder / "meta" / "metadata").read_text())
    body, digest = saved["body"], saved["sha256"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _Broken(f"its metadata cannot be read ({line(error)})") from error
  if digest != of_json(body):
    raise _Broken("its metadata differs from the digest saved with it")
  return body


def _check_names(folder: epath.Path, there: set[str], here: set[str]) -> None:
  """Raises unless a checkpoint has the leaves of a state, and no others."""
  kinds = ("without", sorted(here - there)), ("with", sorted(there - here))
  wrong = [
    f"{kind} {', '.join(names[:3])}"
    + (f" and {len(names) - 3} more" * (len(names) > 3))
    for kind, names in kinds
    if names
  ]
  if wrong:
    raise BadCheckpoint(
      f"{folder} is of another model or optimizer, {' and '.join(wrong)}; go on with "
      "the version that wrote it, or give another --workdir."
    )


def _read_positions(folder: epath.Path, digest: str) -> dict[str, Any]:
  """The state of each reader; what one process alone wrote once has another name."""
  old = folder / "process_0-of-1.json"
  try:
    found = json.loads((old if old.exists() else folder / _DATA).read_text())
  except (OSError, ValueError) as error:
    raise _Broken(f"its data position cannot be read ({line(error)})") from error
  if of_json(found) != digest:
    raise _Broken("the data position differs from the digest saved with it")
  return {"0": found} if old.exists() else found


def _arrays(
  manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Arrays by path, of NumPy; where several processes share them, global ones."""
  late_reads.forget()
  try:
    shared = like is not None and hosts.count() > 1
    if like is None:
      like = manager.item_metadata(step)["state"].tree
    assert like is not None
    target = {
      name: x if shared else np.empty(x.shape, x.dtype) for name, x in like.items()
    }
    restore = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    arrays = dict(manager.restore(step, args=restore)["state"])
  except Exception as error:  # Orbax raises many kinds, down to bare Exception
    raise _Broken(f"it cannot be read ({line(error)})") from error
  if (of := arrays.get("step")) is None or int(of) != step:
    raise _Broken(f"it holds the state of step {of}")
  return arrays


def line(error: Exception) -> str:
  """Its first line; of a long one the begin, and the end, which has the reason."""
  lines = str(error).strip().splitlines()
  text = lines[0] if lines else ""
  text = text if len(text) <= 220 else f"{text[:100]} ... {text[-115:]}"
  return f"{type(error).__name__}: {text}"
