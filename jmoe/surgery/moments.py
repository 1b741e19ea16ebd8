"""An optimizer's state after an operation that only takes, copies or joins arrays."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jmoe.surgery.frame import Model


def moments(change: Callable[[Model], Model], before: Model, state: Any) -> Any:
  """The state with the same done to every tree in it that has the parameters' names.

  Right for what takes or copies experts (`cut_model`, `upcycle.expand` without noise):
  a copy's moments are those of what it was copied from (Komatsuzaki et al. 2022, arXiv
  2212.05055, keep them for vision models and begin anew for language).  Counts and
  schedules stay as they are.

  Args:
    change: the operation.
    before: the model that it was given.
    state: of an optax chain, whose moments are mappings by the parameters' names.

  Raises:
    ValueError: no such mapping, or one that has some of the names: an optimizer that
      keeps other things for other parameters.
  """
  names, found = set(before.params), []

  def is_moment(node: Any) -> bool:
    if not isinstance(node, Mapping) or not names & set(node):
      return False
    if set(node) != names:
      missing = sorted(names - set(node))
      raise ValueError(
        f"moments: a part of the optimizer's state has no {missing[0]}; begin the "
        "optimizer anew."
      )
    return True

  def moved(node: Any) -> Any:
    if not is_moment(node):
      return node
    found.append(node)
    return dict(change(before._replace(params=node)).params)

  made = jax.tree.map(moved, state, is_leaf=is_moment)
  if not found:
    raise ValueError(
      "moments: the state has no tree by the parameters' names; pass that of an optax "
      "chain over them."
    )
  return made
