"""Checkpoints: state, data position and configuration together, each tensor digested.

Orbax (its stable v0 manager) writes them; it restores flipped bytes without a word, so
a digest of every tensor is saved and compared.  An unfinished save is a folder with
another name, which Orbax ignores.

Nothing in them knows of devices or processes: what some wrote, any others can read
(`experiments.restoring`).
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments import hosts, remote
from experiments.data import Readers
from experiments.digests import digests as digests, named as named, of_json
from experiments.errors import BadCheckpoint
from experiments.restoring import digest_of, line, manager_of, newest_whole
from experiments.state import TrainState

Batches = Readers | grain.DatasetIterator


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: theirs alone; made if missing.
    facts: what must be equal for a run to go on, as JSON: its configuration, its data.
    shared: whether all processes see this folder; else it is a copy of each one's own
      (`experiments.remote`), which holds all of what there was and its part of the new.
    keep_every: steps whose multiples are kept beside the last two; None: none.
  """

  def __init__(
    self,
    folder: epath.Path,
    facts: dict[str, Any],
    *,
    shared: bool = True,
    keep_every: int | None = None,
  ):
    self._folder, self._shared = folder, shared or hosts.count() == 1
    # Through JSON, so that what was read back compares equal.
    self._facts = json.loads(json.dumps(facts))
    self._manager = manager_of(
      folder, ours=True, shared=self._shared, keep_every=keep_every
    )

  @property
  def latest(self) -> int | None:
    """The step of the last checkpoint, whole or not; None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, batches: Batches) -> None:
    """Saves in the background; waits for a save that is still under way.

    Every process of a job calls it, with its own batches.

    Raises:
      BadCheckpoint: this one or the last could not be written, as on a full disk; those
        before it are whole.
    """
    self.wait()
    if hosts.count() == 1:
      # A copy: the next step may reuse the buffers that a view would show.  Whole, so
      # that what lies on many devices is written as what lay on one.
      state = jax.tree.map(lambda x: np.array(x), state)
    positions = _positions(batches)
    body = {
      "facts": self._facts,
      "digests": digests(state),
      "data": of_json(positions),
    }
    with self._writing():
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(named(state)),
          data=ocp.args.JsonSave(positions),
          meta=ocp.args.JsonSave({"body": body, "sha256": of_json(body)}),
        ),
        force=True,  # also when it is not later than one that was found broken
      )

  def restore(self, like: TrainState, batches: Batches) -> TrainState:
    """The newest whole state; `batches` is set to where it was.

    Later ones, which are not whole, are named on stderr and moved to `broken/` beside
    the checkpoints' folder, as soon as an earlier one is found to be whole.

    Args:
      like: a state of the same shapes (`jax.eval_shape` gives one); with shardings
        the arrays are laid out by them.
      batches: an iterator made as that of the saved run was, over any readers of it.

    Raises:
      BadCheckpoint: none is whole, or they are of another run; nothing was changed.
    """
    reader = (
      self._manager if hosts.count() == 1 else manager_of(self._folder, ours=False)
    )
    step, found, broken = newest_whole(
      reader, self._folder, facts=self._facts, like=named(like)
    )
    if reader is not self._manager:
      reader.close()
    for each in broken if hosts.is_first() or not self._shared else []:
      place = _set_aside(self._folder, each)
      print(f"moved to {place}; going on from step {step}.", file=sys.stderr)
    hosts.exchange("broken checkpoints", "")  # moved, for every process
    if broken:
      self._manager.reload()
    if isinstance(batches, Readers):
      batches.set_state(found.positions)
    else:
      batches.set_state(found.positions["0"])
      batches.start_prefetch()
    leaves = [_placed(found.arrays[n], x) for n, x in named(like).items()]
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
        f"{self._folder}: a checkpoint cannot be written ({line(error)}); make room "
        "or mend it, and the same command goes on from the last whole one."
      ) from error


class Saved(NamedTuple):
  """What a checkpoint holds, by name; see `read`."""

  step: int
  params: dict[str, np.ndarray]
  balance: dict[str, np.ndarray]
  facts: dict[str, Any]  # of the run, as `Checkpoints` was given them
  optimizer: dict[str, np.ndarray]  # its state, by path
  rest: dict[str, np.ndarray]  # "step", "skipped", "key"
  positions: dict[str, Any]  # of the readers of its data


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


def digest(folder: epath.Path) -> str:
  """Of all that a run's newest checkpoint holds, as it was saved.

  Args:
    folder: the checkpoints of a run.

  Raises:
    BadCheckpoint: there is none, or its metadata is broken.
  """
  with remote.fetched(folder) as here:
    steps = [int(p.name) for p in here.glob("*") if p.name.isdecimal()]
    if not steps:
      raise BadCheckpoint(f"{folder} holds no checkpoint; give the folder of a run.")
    return digest_of(here / str(max(steps)))


def _read(folder: epath.Path, step: int | None) -> Saved:
  manager = manager_of(folder, ours=False)
  try:
    if not manager.all_steps() or step not in (None, *manager.all_steps()):
      which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      found = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
      raise BadCheckpoint(f"{folder} holds {which}; steps there: {found}.")
    found, whole, _ = newest_whole(
      manager,
      folder,
      only=step,
      remedy="give another run, or restore this one from a copy",
    )
  finally:
    manager.close()
  params, balance, optimizer = (
    {n.removeprefix(kind): x for n, x in whole.arrays.items() if n.startswith(kind)}
    for kind in ("params/", "balance/", "optimizer/")
  )
  rest = {n: x for n, x in whole.arrays.items() if "/" not in n}
  return Saved(found, params, balance, whole.facts, optimizer, rest, whole.positions)


def _placed(x: Any, like: Any) -> jax.Array:
  """An array as it lay, or as those of a new run do."""
  at = getattr(like, "sharding", None)
  if hosts.count() > 1:
    return x
  if at is None:
    return jnp.array(x)
  return jax.make_array_from_callback(x.shape, at, lambda index: x[index])


def _set_aside(folder: epath.Path, step: int) -> epath.Path:
  """Moves a checkpoint to broken/STEP, or STEP-2 and so on; returns where it is."""
  shelf = folder.parent / "broken"
  shelf.mkdir(parents=True, exist_ok=True)
  names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
  place = next(shelf / name for name in names if not (shelf / name).exists())
  (folder / str(step)).rename(place)
  return place


def _positions(batches: Batches) -> dict[str, Any]:
  """The state of every reader of a job, of which processes may have some each."""
  if not isinstance(batches, Readers):
    return {"0": batches.get_state()}
  found: dict[str, Any] = {}
  for text in hosts.exchange("data positions", json.dumps(batches.get_state())):
    found |= json.loads(text)
  return found
