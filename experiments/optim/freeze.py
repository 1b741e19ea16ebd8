"""What stays as it is: whole roles, and experts by number in every layer."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.optim import roles
from jmoe.use import nearest

_EXPERTS = "experts:"


class Frozen(NamedTuple):
  """What `freeze` names, for one model."""

  names: frozenset[str]  # parameters that stay as a whole
  members: dict[str, np.ndarray]  # bool[E, 1, ...] of others: the experts that stay

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
    freeze: roles, and "experts:0,3": experts by number, the same in every layer.
    params: anything with a shape, by name.

  Raises:
    ValueError: no such role or expert in the model, or nothing is left to train.
  """
  present = {name: roles.role(name) for name in params}
  names: set[str] = set()
  numbers: set[int] = set()
  for entry in freeze:
    if entry.startswith(_EXPERTS):
      numbers |= _numbers(entry)
    elif entry not in roles.ROLES:
      known = (*roles.ROLES, "experts:0,1")
      raise ValueError(f"optim.freeze={entry!r}; {nearest(entry, known)}")
    elif entry not in present.values():
      raise ValueError(
        f"optim.freeze={entry!r}: this model has no parameter of that role, only "
        f"{', '.join(sorted(set(present.values())))}."
      )
    names |= {name for name, r in present.items() if r == entry}
  experts = _experts(params)
  _check(numbers, experts)
  members: dict[str, np.ndarray] = {}
  for name, inside in experts.items():
    frozen_E = np.isin(inside, list(numbers))
    if name not in names and frozen_E.any():
      after = len(params[name].shape) - roles.stacked(name)
      members[name] = frozen_E.reshape(-1, *[1] * after)
      if frozen_E.all():
        names.add(name)
        del members[name]
  if names == set(params):
    raise ValueError(
      f"optim.freeze={tuple(freeze)} leaves nothing to train; name less."
    )
  return Frozen(frozenset(names), members)


def _numbers(entry: str) -> set[int]:
  parts = entry.removeprefix(_EXPERTS).split(",")
  if not all(part.strip().isdecimal() for part in parts):
    raise ValueError(
      f"optim.freeze={entry!r}; give the numbers of experts, as in 'experts:0,3'."
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


def _check(numbers: set[int], experts: Mapping[str, range]) -> None:
  if numbers and not experts:
    raise ValueError(
      "optim.freeze names experts, but no layer has any; leave them out."
    )
  sizes: dict[str, int] = {}
  for name, inside in experts.items():
    layer = name.partition(".experts.")[0]
    sizes[layer] = max(sizes.get(layer, 0), inside.stop)
  for layer, size in sizes.items():
    if numbers and max(numbers) >= size:
      raise ValueError(
        f"optim.freeze names expert {max(numbers)}, but {layer} has {size} with "
        f"parameters; give numbers of 0 to {size - 1}."
      )
