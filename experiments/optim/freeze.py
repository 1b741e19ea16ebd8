"""What stays as it is: whole roles, and experts or gate columns by number."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.optim import roles
from jmoe.use import nearest

_EXPERTS, _COLUMNS = "experts:", "columns:"
_ONE = {"experts": "expert", "columns": "column"}


class Frozen(NamedTuple):
  """What `freeze` names, for one model."""

  names: frozenset[str]  # parameters that stay as a whole
  members: dict[str, np.ndarray]  # bool[E, 1, ...] of others: the ones that stay

  def without(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that are trained, with zeros for frozen experts."""
    kept = {n: x for n, x in arrays.items() if n not in self.names}
    return kept | {
      n: jnp.where(self.members[n], jnp.zeros_like(x), x)
      for n, x in kept.items()
      if n in self.members
    }

  def held(self, updates: Mapping[str, Array]) -> dict[str, Array]:
    """Updates that leave every bit of frozen experts as it is."""
    # Minus zero: the one number that changes neither 0.0 nor -0.0 when it is added.
    return dict(updates) | {
      n: jnp.where(mask, jnp.full_like(updates[n], -0.0), updates[n])
      for n, mask in self.members.items()
    }


def frozen(freeze: Sequence[str], params: Mapping[str, Any]) -> Frozen:
  """What `Optim.freeze` means for these parameters.

  Args:
    freeze: roles; "experts:0,3", experts by number, the same in every layer; and
      "columns:0,3", what gates have for these experts.
    params: anything with a shape, by name.

  Raises:
    ValueError: no such role or expert in the model, or nothing is left to train.
  """
  present = {name: roles.role(name) for name in params}
  names: set[str] = set()
  numbers: set[int] = set()
  columns: set[int] = set()
  for entry in freeze:
    if entry.startswith(_EXPERTS):
      numbers |= _numbers(entry)
    elif entry.startswith(_COLUMNS):
      columns |= _numbers(entry)
    elif entry not in roles.ROLES:
      known = (*roles.ROLES, "experts:0,1", "columns:0,1")
      raise ValueError(f"optim.freeze={entry!r}; {nearest(entry, known)}")
    elif entry not in present.values():
      raise ValueError(
        f"optim.freeze={entry!r}: this model has no parameter of that role, only "
        f"{', '.join(sorted(set(present.values())))}."
      )
    names |= {name for name, r in present.items() if r == entry}
  experts = _experts(params)
  gates = _gates(params)
  _check("experts", numbers, experts)
  _check("columns", columns, {name: range(size) for name, (size, _) in gates.items()})
  members: dict[str, np.ndarray] = {}
  asked = {
    name: (
      np.isin(inside, list(numbers)),
      len(params[name].shape) - roles.stacked(name),
    )
    for name, inside in experts.items()
  }
  asked |= {
    name: (np.isin(np.arange(size), list(columns)), after)
    for name, (size, after) in gates.items()
  }
  for name, (frozen_E, after) in asked.items():
    if frozen_E.all():
      names.add(name)
    elif frozen_E.any() and name not in names:
      members[name] = frozen_E.reshape(-1, *[1] * after)
  if names == set(params):
    raise ValueError(
      f"optim.freeze={tuple(freeze)} leaves nothing to train; name less."
    )
  return Frozen(frozenset(names), members)


def renumbered(
  freeze: Sequence[str], origins: Sequence[Sequence[int]] | None
) -> tuple[str, ...]:
  """The same freeze for a model whose experts have got other numbers.

  Args:
    freeze: as for `frozen`.
    origins: of each sparse layer in order of depth, the old number of each new expert;
      None: new experts are no copies of single old ones.

  Raises:
    ValueError: experts by number that have no longer one number in all layers.
  """
  found = []
  for entry in freeze:
    if not entry.startswith((_EXPERTS, _COLUMNS)):
      found.append(entry)
      continue
    old = _numbers(entry)
    layers = {
      tuple(new for new, origin in enumerate(layer) if origin in old)
      for layer in origins or ()
    }
    if len(layers) != 1:
      raise ValueError(
        f"optim.freeze={entry!r} numbers experts that are not there any more, or not "
        "under one number in all layers; say what the new run freezes, as by "
        "--set optim.freeze='()'."
      )
    (numbers,) = layers
    if numbers:
      found.append(f"{entry.partition(':')[0]}:{','.join(map(str, numbers))}")
  return tuple(found)


def _numbers(entry: str) -> set[int]:
  kind, _, listed = entry.partition(":")
  parts = listed.split(",")
  if not all(part.strip().isdecimal() for part in parts):
    raise ValueError(
      f"optim.freeze={entry!r}; give the numbers of experts, as in '{kind}:0,3'."
    )
  return {int(part) for part in parts}


def _experts(params: Mapping[str, Any]) -> dict[str, range]:
  """The numbers of the experts that each expert parameter is of."""
  found: dict[str, range] = {}
  for name, param in params.items():
    if roles.role(name) == "expert":
      found[name] = range(param.shape[roles.stacked(name) - 1])
  for name, inside in found.items():
    layer, _, local = name.partition(".experts.")
    if local.startswith("base."):
      continue
    # Experts of `with_free` that have parameters of their own come after its base.
    base = [n for n in found if n.startswith(f"{layer}.experts.base.")]
    first = len(found[base[0]]) if base else 0
    found[name] = range(first, first + len(inside))
  return found


def _gates(params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
  """Of what gates have for each expert: how many, and dimensions after that one."""
  found: dict[str, tuple[int, int]] = {}
  for name, param in params.items():
    letters = name.rpartition("_")[2]
    if ".gate." in name and roles.role(name) == "gate" and "E" in letters:
      after = len(letters) - 1 - letters.index("E")
      found[name] = param.shape[-1 - after], after
  return found


def _check(kind: str, numbers: set[int], experts: Mapping[str, range]) -> None:
  if numbers and not experts:
    raise ValueError(
      f"optim.freeze names {kind}, but no layer has any; leave them out."
    )
  sizes: dict[str, int] = {}
  for name, inside in experts.items():
    layer = name.partition(".experts." if kind == "experts" else ".gate.")[0]
    sizes[layer] = max(sizes.get(layer, 0), inside.stop)
  for layer, size in sizes.items():
    if numbers and max(numbers) >= size:
      raise ValueError(
        f"optim.freeze names {_ONE[kind]} {max(numbers)}, but {layer} has {size} with "
        f"parameters; give numbers of 0 to {size - 1}."
      )
