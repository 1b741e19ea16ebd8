"""Every device sees all tokens and runs its own experts; outputs are summed home."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch import carry
from jmoe.dispatch.layout import ragged
from jmoe.dispatch.ragged_all_to_all import buffer_rows
from jmoe.dispatch.replicas import physical
from jmoe.dispatch.requeue import requeue
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Plan, Rows
from jmoe.use import marked


@marked(dropless=None, exchanges=True)
def all_gather(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  block: int | None = None,
) -> Array:
  """Tokens and their choices are gathered, partial sums are scattered back.

  An all-gather of `[T,D]` and a reduce-scatter of as much, whatever k is: cheap where a
  token goes to experts on most devices.  Takes plans with a capacity and without.

  Args:
    x_TD: this device's tokens.
    plan: of these.
    experts: this device's, rows -> [R,D].
    home: how outputs come home.
    axis: mesh axes over which the experts are; none: all are here.
    placement: the expert of each slot of these axes, if some are there twice.
    block: rows an expert's group is aligned to; None chooses.

  Returns:
    `[T,D]` or `[T,K,D]`.
  """
  routing, T = plan.routing, x_TD.shape[0]
  expert_N, E = physical(plan, placement)
  token_N, weights = routing.token, (home.weight, home.input_scale)
  n = lax.psum(1, axis) if axis else 1
  local = E // n
  expert_N = jnp.where(plan.kept, expert_N, -1)
  if axis:
    me = lax.axis_index(axis)
    x_TD, expert_N, weights = lax.all_gather(
      (x_TD, expert_N, weights), axis, tiled=True
    )
    expert_N = expert_N - me * local  # those before mine are negative
    if routing.k is None:
      token_N = lax.all_gather(token_N + me * T, axis, tiled=True)
    else:  # in token order, as on each device
      token_N = jnp.repeat(jnp.arange(n * T, dtype=jnp.int32), routing.k)
  bound = buffer_rows(plan, n, local)
  mine = requeue(expert_N, token_N, local, n * T, routing.k, bound)
  mean = expert_N.shape[0] / E
  layout = ragged(mine, block, alignment=row_alignment(x_TD.dtype, mean))
  way = Home(weights[0], input_scale=weights[1], sums=home.sums)
  y = carry.through(x_TD, layout, experts, way)
  return lax.psum_scatter(y, axis, tiled=True) if axis else y
