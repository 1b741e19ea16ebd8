"""An optimizer's state after an operation on the model that it moved."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.digests import named
from jmoe import surgery

_MASTER = ("master",)  # float32 copies, which are weights and no moments
Place = tuple[tuple[str, ...], tuple[str, ...]]  # what is before and after a name


def optimizer(
  saved: Mapping[str, Any],
  fresh: Any,
  *,
  change: Callable[[surgery.Model], surgery.Model],
  before: surgery.Model,
  after: surgery.Model,
) -> Any:
  """The state of the new model's optimizer: counts kept, moments changed alike.

  What the old run had frozen, and what is new, has moments of zero.

  Args:
    saved: of the old run, by path.
    fresh: of the new run, as its optimizer begins.
    change: what is done to a tree of moments, as for `surgery.moments`.
    before: the model that the operation was given.
    after: the model that it made.

  Raises:
    ValueError: another optimizer, or one that keeps other things than numbers of the
      parameters' shapes, such as Adafactor's rows and columns.
  """
  leaves = named(fresh)
  old, counts = _groups(saved, before.params)
  new, others = _groups(leaves, after.params)
  if set(old) - {(_MASTER, ())} != set(new) - {(_MASTER, ())} or set(counts) != set(
    others
  ):
    raise ValueError(
      "the new run's optimizer keeps other things than the old one's did; leave "
      "optim.kind and optim.accumulate as they were"
    )
  moved = dict(leaves) | counts
  for place, group in new.items():
    if place[0] == _MASTER:
      continue
    full = {
      name: np.zeros(np.shape(x), np.float32) for name, x in before.params.items()
    }
    for name, x in old[place].items():
      if np.shape(x) != full[name].shape:
        raise ValueError(
          f"the optimizer keeps {np.shape(x)} for {name} {full[name].shape}, which "
          "cannot be cut or copied with it"
        )
    (made,) = surgery.moments(change, before, [full | dict(old[place])])
    for name in group:
      moved["/".join((*place[0], name, *place[1]))] = made[name]
  treedef = jax.tree.structure(fresh)
  return jax.tree.unflatten(
    treedef, [np.asarray(moved[path]).astype(x.dtype) for path, x in leaves.items()]
  )


def _groups(
  leaves: Mapping[str, Any], names: Mapping[str, Any]
) -> tuple[dict[Place, dict[str, Any]], dict[str, Any]]:
  """Leaves by where they are but for a parameter's name; and those that are of none."""
  groups: dict[Place, dict[str, Any]] = {}
  rest = {}
  for path, leaf in leaves.items():
    parts = tuple(path.split("/"))
    at = [n for n, part in enumerate(parts) if part in names]
    if not at:
      rest[path] = leaf
      continue
    place = parts[: at[0]], parts[at[0] + 1 :]
    groups.setdefault(place, {})[parts[at[0]]] = leaf
  return groups, rest
