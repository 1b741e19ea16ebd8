"""Checkpoints: state, data position and configuration together, each tensor digested.

Orbax (its stable v0 manager) writes them; it restores flipped bytes without a word, so
a sha256 of every tensor is saved and compared.  An unfinished save is a folder with
another name, which Orbax ignores.
"""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore, CheckpointSave

from experiments.errors import BadCheckpoint
from experiments.state import TrainState, path_part
from experiments.workdir import differences, listed


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: theirs alone; made if missing.
    facts: what must be equal for a run to go on, as JSON: its configuration, its data.
  """

  def __init__(self, folder: Path, facts: dict[str, Any]):
    self._folder = folder
    # Through JSON, so that what was read back compares equal.
    self._facts = json.loads(json.dumps(facts))
    if folder.exists() and not folder.is_dir():
      raise BadCheckpoint(f"{folder} is a file; give another --workdir.")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    self._manager = ocp.CheckpointManager(
      folder.absolute(), options=options, item_names=("state", "data", "meta")
    )

  @property
  def latest(self) -> int | None:
    """The step of the last whole checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves in the background; waits for a save that is still under way."""
    self._manager.wait_until_finished()
    # A copy: the next step may reuse the buffers that a view would show.
    host = jax.tree.map(lambda x: np.array(x), state)
    body = {
      "facts": self._facts,
      "digests": digests(host),
      "data": _digest(json.dumps(batches.get_state(), sort_keys=True).encode()),
    }
    self._manager.save(
      int(host.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(named(host)),
        data=CheckpointSave(batches),
        meta=ocp.args.JsonSave({"body": body, "sha256": _of_json(body)}),
      ),
    )

  def restore(self, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The last state; `batches` is set to where it was.

    Args:
      like: a state of the same shapes (`jax.eval_shape` gives one).
      batches: an iterator made as that of the saved run was.

    Raises:
      BadCheckpoint: with the folder, what is wrong and the remedy.
    """
    step = self.latest
    assert step is not None
    body = self._meta(step)
    remedy = self._remedy(step)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(named(like)), data=CheckpointRestore(batches)
        ),
      )
    except Exception as error:  # Orbax raises many kinds, down to bare Exception
      raise BadCheckpoint(
        f"{self._folder}, step {step} cannot be read ({_line(error)}); {remedy}"
      ) from error
    # Through the host, so that they are placed as those of a new run are.
    arrays = {name: np.asarray(x) for name, x in restored["state"].items()}
    found = digests(arrays)
    wrong = [name for name, value in body["digests"].items() if found[name] != value]
    position = json.dumps(batches.get_state(), sort_keys=True).encode()
    if _digest(position) != body["data"]:
      wrong.append("the data position")
    if wrong:
      raise BadCheckpoint(
        f"{self._folder}, step {step} is corrupt: {wrong[0]} "
        + (f"and {len(wrong) - 1} more differ" if len(wrong) > 1 else "differs")
        + f" from the digest saved with it; {remedy}"
      )
    leaves = [jnp.array(arrays[name]) for name in named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _meta(self, step: int) -> dict[str, Any]:
    """What was saved beside the arrays; its own digest and its facts are compared."""
    try:
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      meta = self._manager.restore(step, args=args)["meta"]
      body = meta["body"]
      whole = meta["sha256"] == _of_json(body)
    except Exception as error:
      raise BadCheckpoint(
        f"{self._folder}, step {step} is no checkpoint of this program "
        f"({_line(error)}); give another --workdir."
      ) from error
    if not whole:
      raise BadCheckpoint(
        f"{self._folder}, step {step}: its metadata is corrupt; {self._remedy(step)}"
      )
    if different := differences(body["facts"], self._facts):
      raise BadCheckpoint(
        f"{self._folder} is of another run: {listed(different)}; "
        "give another --workdir."
      )
    return body

  def _remedy(self, step: int) -> str:
    earlier = [s for s in self._manager.all_steps() if s < step]
    then = f"resume from step {max(earlier)}" if earlier else "start anew"
    return f"delete {self._folder / str(step)} to {then}."


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
  return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
