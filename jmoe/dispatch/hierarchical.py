"""Capacity buckets in two steps: inside a node, then between nodes."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

from jax import Array, lax

from jmoe.dispatch.all_to_all import check, exchanged, fits_mesh
from jmoe.types import Home, Plan, Rows
from jmoe.use import marked


@marked(dropless=False, exchanges=True, check=check, fits_mesh=fits_mesh)
def hierarchical(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  overlap: int = 1,
) -> Array:
  """`all_to_all`, one mesh axis after the other, the last first.

  Tutel's 2DH (arXiv 2206.03382), section 4.2: what goes to one node is collected inside
  the sender's, so that messages between nodes are fewer and larger by the number of
  devices in a node.  The last axis of `Rules(expert=("node", "expert"))` is the one
  inside.

  Args and errors: as for `all_to_all`, and of one axis the same.
  """
  sizes = tuple(lax.psum(1, a) for a in axis)

  def there(x_ESD: Array) -> Array:
    S, D = x_ESD.shape[1:]
    x = x_ESD.reshape(*sizes, -1, S, D)
    for i in reversed(range(len(axis))):
      x = lax.all_to_all(x, axis[i], i, len(axis) + 1, tiled=True)
    return x.reshape(*x.shape[len(axis) :])

  def back(y_eSD: Array) -> Array:
    E, S, D = y_eSD.shape
    y = y_eSD.reshape(*[1] * len(axis), E, S, D)
    for i in range(len(axis)):
      y = lax.all_to_all(y, axis[i], len(axis) + 1, i, tiled=True)
    return y.reshape(-1, *y.shape[len(axis) + 1 :])

  return exchanged(x_TD, plan, experts, home, there, back, placement, overlap, axis)
