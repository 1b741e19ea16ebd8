"""Every device sees all tokens and runs its own experts; outputs are summed home."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch import carry, everywhere, own_first as apart, placed
from jmoe.dispatch.all_to_all import check_own_first
from jmoe.dispatch.layout import ragged
from jmoe.dispatch.ragged_all_to_all import buffer_rows
from jmoe.dispatch.replicas import physical
from jmoe.dispatch.requeue import requeue
from jmoe.keeping import named
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Plan, Rows
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
      (`own_first`).

  Returns:
    `[T,D]` or `[T,K,D]`.
  """
  routing, T = plan.routing, x_TD.shape[0]
  expert_N, E = physical(plan, placement)
  token_N, weights = routing.token, (home.weight, home.input_scale)
  n = lax.psum(1, axis) if axis else 1
  local = E // n
  expert_N = jnp.where(plan.kept, expert_N, -1)
  mean = n * expert_N.shape[0] / E
  align = row_alignment(x_TD.dtype, mean)
  bound = buffer_rows(plan, n, local)
  if own_first and n > 1:
    return _own_first(
      x_TD, expert_N, plan, experts, home, axis, local, bound, block, align
    )
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
  mine = requeue(expert_N, token_N, local, n * T, routing.k, bound)
  layout = ragged(mine, block, alignment=align)
  way = Home(weights[0], input_scale=weights[1], sums=home.sums)
  y = carry.through(x_TD, layout, experts, way, travels=bool(axis))
  return _WAYS[by][1](y, axis) if axis else y


def _own_first(
  x_TD, expert_N, plan, experts, home, axis, local, bound, block, align
) -> Array:
  """The same with tokens in two buffers: this device's own, and the others'."""
  routing, T, n = plan.routing, x_TD.shape[0], lax.axis_size(axis)
  own = expert_N, routing.token, home.weight, home.input_scale
  late = named(apart.others(own, axis), "routing")
  # Where each of the others' tokens is in the circle: behind those before its device.
  circle = jnp.repeat(jnp.arange(n - 1, dtype=jnp.int32) * T, routing.token.shape[0])
  layouts, ways = [], []
  for (expert, token, weight, scale), offset, size in (
    (own, 0, T),
    (late, circle, (n - 1) * T),
  ):
    mine = expert - lax.axis_index(axis) * local  # those before mine are negative
    most = None if bound is None else min(bound, expert.shape[0])
    queued = requeue(mine, token + offset, local, size, routing.k, most)
    layouts.append(ragged(queued, block, alignment=align))
    ways.append(Home(weight, input_scale=scale, sums=home.sums))
  tokens = x_TD, apart.others(x_TD, axis)
  y, y_late = carry.through_each(tokens, layouts, experts, ways, travels=True)
  return y + apart.from_others(y_late, axis)
