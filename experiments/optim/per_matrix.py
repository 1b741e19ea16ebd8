"""An optax transformation that sees one matrix of a stack at a time."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax


def per_matrix(
  transformations: Mapping[str, optax.GradientTransformation],
  stacked: Mapping[str, int],
) -> optax.GradientTransformation:
  """Each parameter by its own transformation, each member of a stack by itself.

  What a transformation measures of an array (rows and columns of Adafactor's second
  moment, the root mean square of an update) is then measured of one matrix of one
  expert of one layer, whatever the stack's other sizes are.

  Args:
    transformations: by the name of the parameter; each of a single array.
    stacked: over how many leading dims each parameter is a stack.

  Returns:
    A transformation of dictionaries by these names.
  """

  def every(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    for _ in range(stacked[name]):
      function = jax.vmap(function)
    return function

  def init(params):
    return {n: every(transformations[n].init, n)(p) for n, p in params.items()}

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("per_matrix: params=None; pass the parameters to update(...).")
    done = {
      n: every(transformations[n].update, n)(u, state[n], params[n])
      for n, u in updates.items()
    }
    return {n: u for n, (u, _) in done.items()}, {n: s for n, (_, s) in done.items()}

  return optax.GradientTransformation(init, update)
