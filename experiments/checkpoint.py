"""Checkpoints: state, data position and configuration together, each tensor digested.

Orbax (its stable v0 manager) writes them; it restores flipped bytes without a word, so
a sha256 of every tensor is saved and compared.  An unfinished save is a folder with
another name, which Orbax ignores.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from grain.checkpoint import CheckpointRestore, CheckpointSave

from experiments import remote
from experiments.errors import BadCheckpoint
from experiments.state import TrainState, path_part
from experiments.workdir import differences, listed


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: theirs alone; made if missing.
    facts: what must be equal for a run to go on, as JSON: its configuration, its data.
  """

  def __init__(self, folder: epath.Path, facts: dict[str, Any]):
    self._folder = folder
    # Through JSON, so that what was read back compares equal.
    self._facts = json.loads(json.dumps(facts))
    self._manager = _manager(folder, ours=True)

  @property
  def latest(self) -> int | None:
    """The step of the last checkpoint, whole or not; None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves in the background; waits for a save that is still under way.

    Raises:
      BadCheckpoint: this one or the last could not be written, as on a full disk; those
        before it are whole.
    """
    self.wait()
    # A copy: the next step may reuse the buffers that a view would show.
    host = jax.tree.map(lambda x: np.array(x), state)
    body = {
      "facts": self._facts,
      "digests": digests(host),
      "data": _position(batches),
    }
    with self._writing():
      self._manager.save(
        int(host.step),
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(named(host)),
          data=CheckpointSave(batches),
          meta=ocp.args.JsonSave({"body": body, "sha256": _of_json(body)}),
        ),
        force=True,  # also when it is not later than one that was found broken
      )

  def restore(self, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The newest whole state; `batches` is set to where it was.

    Later ones, which are not whole, are named on stderr and moved to `broken/` beside
    the checkpoints' folder, as soon as an earlier one is found to be whole.

    Args:
      like: a state of the same shapes (`jax.eval_shape` gives one).
      batches: an iterator made as that of the saved run was.

    Raises:
      BadCheckpoint: none is whole, or they are of another run; nothing was changed.
    """
    target = ocp.args.StandardRestore(named(like))
    step, state, _, broken = _newest_whole(
      self._manager,
      self._folder,
      facts=self._facts,
      args={"state": target, "data": CheckpointRestore(batches)},
      position=lambda: _position(batches),
    )
    for each in broken:
      place = _set_aside(self._folder, each)
      print(f"moved to {place}; going on from step {step}.", file=sys.stderr)
    if broken:
      self._manager.reload()
    leaves = [jnp.array(state[name]) for name in named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def wait(self) -> None:
    """Until the last save is whole; raises as `save`."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save; raises as `save`."""
    self.wait()
    self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # a full disk is a ValueError of TensorStore
      raise BadCheckpoint(
        f"{self._folder}: a checkpoint cannot be written ({_line(error)}); make room "
        "or mend it, and the same command goes on from the last whole one."
      ) from error


class Saved(NamedTuple):
  """What a checkpoint holds, by name; see `read`."""

  step: int
  params: dict[str, np.ndarray]
  balance: dict[str, np.ndarray]
  facts: dict[str, Any]  # of the run, as `Checkpoints` was given them


def read(folder: epath.Path, step: int | None = None) -> Saved:
  """Parameters and balance state of a run's newest whole checkpoint; writes nothing.

  Args:
    folder: the checkpoints of a run.
    step: this one, and no other.

  Raises:
    BadCheckpoint: there is none, or none is whole; those found broken are named on
      stderr.
  """
  with remote.fetched(folder) as here:
    if not here.is_dir():
      raise BadCheckpoint(f"{folder} holds no checkpoint; give the folder of a run.")
    return _read(here, step)


def _read(folder: epath.Path, step: int | None) -> Saved:
  manager = _manager(folder, ours=False)
  try:
    if not manager.all_steps() or step not in (None, *manager.all_steps()):
      which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      found = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
      raise BadCheckpoint(f"{folder} holds {which}; steps there: {found}.")
    found, arrays, facts, _ = _newest_whole(
      manager,
      folder,
      args={"state": ocp.args.StandardRestore()},
      only=step,
      remedy="give another run, or restore this one from a copy",
    )
  finally:
    manager.close()
  params, balance = (
    {n.removeprefix(kind): x for n, x in arrays.items() if n.startswith(kind)}
    for kind in ("params/", "balance/")
  )
  return Saved(found, params, balance, facts)


def _manager(folder: epath.Path, *, ours: bool) -> ocp.CheckpointManager:
  """Only what is ours is made, and tidied of saves that were never finished."""
  if folder.exists() and not folder.is_dir():
    raise BadCheckpoint(f"{folder} is a file; give another --workdir.")
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2, create=ours, cleanup_tmp_directories=ours
  )
  return ocp.CheckpointManager(
    os.path.abspath(folder), options=options, item_names=("state", "data", "meta")
  )


class _Broken(Exception):
  """Why a checkpoint is not whole."""


def _newest_whole(
  manager: ocp.CheckpointManager,
  folder: epath.Path,
  *,
  args: dict[str, Any],
  facts: dict[str, Any] | None = None,
  position: Callable[[], str] | None = None,
  only: int | None = None,
  remedy: str = "delete the folder to start anew, or restore it from a copy",
) -> tuple[int, dict[str, np.ndarray], dict[str, Any], list[int]]:
  """(step, arrays by name, facts, later steps that are broken, named on stderr).

  Args:
    manager: of the folder.
    folder: for messages.
    args: what to restore beside the metadata.
    facts: that must be those saved; None: whatever they are.
    position: digest of the data position, after restoring.
    only: the one step to look at.
    remedy: if none is whole.
  """
  steps = sorted(manager.all_steps(), reverse=True) if only is None else [only]
  broken: list[int] = []
  for step in steps:
    try:
      return step, *_whole(manager, folder, step, args, facts, position), broken
    except _Broken as error:
      print(f"checkpoint {folder / str(step)} is broken: {error}", file=sys.stderr)
      broken.append(step)
  raise BadCheckpoint(
    f"{folder} holds no whole checkpoint (steps {', '.join(map(str, steps))} are "
    f"broken); {remedy}."
  )


def _whole(
  manager, folder, step, args, facts, position
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The arrays and facts of one checkpoint, all compared with their digests."""
  try:
    meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
    saved = manager.restore(step, args=meta)["meta"]
    body, digest = saved["body"], saved["sha256"]
  except Exception as error:  # Orbax raises many kinds, down to bare Exception
    raise _Broken(f"its metadata cannot be read ({_line(error)})") from error
  if digest != _of_json(body):
    raise _Broken("its metadata differs from the digest saved with it")
  if facts is not None and (different := differences(body["facts"], facts)):
    raise BadCheckpoint(
      f"{folder} is of another run: {listed(different)}; give another --workdir."
    )
  try:
    restored = manager.restore(step, args=ocp.args.Composite(**args))["state"]
    # Through the host, so that they are placed as those of a new run are.
    arrays = {name: np.asarray(x) for name, x in restored.items()}
  except Exception as error:
    raise _Broken(f"it cannot be read ({_line(error)})") from error
  if (of := arrays.get("step")) is None or int(of) != step:
    raise _Broken(f"it holds the state of step {of}")
  found = digests(arrays)
  wrong = [name for name, value in body["digests"].items() if found.get(name) != value]
  if position is not None and position() != body["data"]:
    wrong.append("the data position")
  if wrong:
    raise _Broken(
      f"{wrong[0]} "
      + (f"and {len(wrong) - 1} more differ" if len(wrong) > 1 else "differs")
      + " from the digest saved with it"
    )
  return arrays, body["facts"]


def _set_aside(folder: epath.Path, step: int) -> epath.Path:
  """Moves a checkpoint to broken/STEP, or STEP-2 and so on; returns where it is."""
  shelf = folder.parent / "broken"
  shelf.mkdir(parents=True, exist_ok=True)
  names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
  place = next(shelf / name for name in names if not (shelf / name).exists())
  (folder / str(step)).rename(place)
  return place


def _position(batches: grain.DatasetIterator) -> str:
  return _digest(json.dumps(batches.get_state(), sort_keys=True).encode())


def named(tree: Any) -> dict[str, Any]:
  """Path -> leaf: what is on disk, which so knows no Python types."""
  return {
    "/".join(map(path_part, path)): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def digests(tree: Any) -> dict[str, str]:
  """Path -> sha256 of the dtype, shape and bytes of each array of a tree."""
  found = {}
  for name, leaf in named(tree).items():
    array = np.asarray(leaf)
    found[name] = _digest(f"{array.dtype}{array.shape}".encode(), array.tobytes())
  return found


def _digest(*parts: bytes) -> str:
  total = hashlib.sha256()
  for part in parts:
    total.update(part)
  return total.hexdigest()


def _of_json(value: Any) -> str:
  return _digest(json.dumps(value, sort_keys=True).encode())


def _line(error: Exception) -> str:
  """Its first line; of a long one the begin, and the end, which has the reason."""
  lines = str(error).strip().splitlines()
  text = lines[0] if lines else ""
  text = text if len(text) <= 220 else f"{text[:100]} ... {text[-115:]}"
  return f"{type(error).__name__}: {text}"
