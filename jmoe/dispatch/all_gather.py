"""Every device sees all tokens and runs its own experts; outputs are summed home."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch import apart, carry, everywhere, placed
from jmoe.dispatch.all_to_all import check_own_first
from jmoe.dispatch.layout import ragged
from jmoe.dispatch.ragged_all_to_all import buffer_rows
from jmoe.dispatch.replicas import physical
from jmoe.dispatch.requeue import requeue
from jmoe.keeping import named
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Layout, Plan, Rows
from jmoe.use import marked

# How tokens go out and sums come home, by name.
_WAYS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
  "all_gather": (
    functools.partial(lax.all_gather, tiled=True),
    functools.partial(lax.psum_scatter, tiled=True),
  ),
  "all_to_all": (everywhere.gathered, everywhere.scattered),
  "ragged": (placed.gathered, placed.scattered),
}


def check(config: Any, *, by: str = "all_gather", own_first: bool = False) -> None:
  del config
  if by not in _WAYS:
    raise ValueError(f"by={by!r}: use one of {', '.join(map(repr, _WAYS))}.")
  check_own_first(own_first, by, "all_gather")


@marked(dropless=None, exchanges=True, check=check)
def all_gather(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  block: int | None = None,
  by: str = "all_gather",
  own_first: bool = False,
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
    by: "all_gather", XLA's collectives; "all_to_all", exchanges of equal parts, with
      the copy of a device's own tokens and the sum beside them; "ragged", tokens go out
      by ragged all-to-alls (`placed`), for GPUs of one host.
    own_first: this device's own tokens are worked on while those of the others come,
      and sums for the others leave while its own are made: by permutations
      (`apart`).  Then a plan's `max_rows` bounds each of both buffers by itself.

  Returns:
    `[T,D]` or `[T,K,D]`.  A layer's configuration refuses `own_first` beside `by`.
  """
  routing, T = plan.routing, x_TD.shape[0]
  expert_N, E = physical(plan, placement)
  token_N, weights = routing.token, (home.weight, home.input_scale)
  n = lax.psum(1, axis) if axis else 1
  local = E // n
  expert_N = jnp.where(plan.kept, expert_N, -1)
  align = row_alignment(x_TD.dtype, n * expert_N.shape[0] / E)
  laid_out = functools.partial(ragged, block=block, alignment=align)
  if own_first and n > 1:
    return _own_first(x_TD, expert_N, plan, experts, home, axis, laid_out, local)
  if axis:
    me = lax.axis_index(axis)
    x_TD = _WAYS[by][0](x_TD, axis)
    # Kept with the rest of the routing, a backward pass need not gather them again.
    gathered = lax.all_gather((expert_N, weights), axis, tiled=True)
    expert_N, weights = named(gathered, "routing")
    expert_N = expert_N - me * local  # those before mine are negative
    if routing.k is None:
      token_N = lax.all_gather(token_N + me * T, axis, tiled=True)
    else:  # in token order, as on each device
      token_N = jnp.repeat(jnp.arange(n * T, dtype=jnp.int32), routing.k)
  bound = buffer_rows(plan, n, local)
  mine = requeue(expert_N, token_N, local, n * T, routing.k, bound)
  way = Home(weights[0], input_scale=weights[1], sums=home.sums)
  y = carry.through(x_TD, laid_out(mine), experts, way, travels=bool(axis))
  return _WAYS[by][1](y, axis) if axis else y


def _own_first(
  x_TD: Array,
  expert_N: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  axis: tuple[str, ...],
  laid_out: Callable[[Plan], Layout],
  local: int,
) -> Array:
  """The same with tokens in two buffers: this device's own, and the others'.

  Args:
    expert_N: i32[N] of each assignment, among all devices' experts.
    laid_out: the layout of a buffer's plan.
    local: experts of a device.
    Others: as for `all_gather`.
  """
  routing, T, n = plan.routing, x_TD.shape[0], lax.axis_size(axis)
  own = expert_N, home.weight, home.input_scale
  late = named(apart.others(own, axis), "routing")
  if routing.k is None:  # behind those of the devices before it in the circle
    first = jnp.repeat(jnp.arange(n - 1, dtype=jnp.int32) * T, expert_N.shape[0])
    late_token = apart.others(routing.token, axis) + first
  else:
    late_token = jnp.repeat(jnp.arange((n - 1) * T, dtype=jnp.int32), routing.k)
  layouts, ways = [], []
  for (expert, weight, scale), token, devices in (
    (own, routing.token, 1),
    (late, late_token, n - 1),
  ):
    mine = expert - lax.axis_index(axis) * local  # those before mine are negative
    most = buffer_rows(plan, devices, local)
    queued = requeue(mine, token, local, devices * T, routing.k, most)
    layouts.append(laid_out(queued))
    ways.append(Home(weight, input_scale=scale, sums=home.sums))
  tokens = x_TD, apart.others(x_TD, axis)
  y, y_late = carry.through_each(tokens, layouts, experts, ways, travels=True)
  return y + apart.from_others(y_late, axis)
