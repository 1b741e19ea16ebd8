"""Capacity buckets to the devices of their experts and home again."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe.assign.capacity import of_group
from jmoe.dispatch import apart, carry, placed
from jmoe.dispatch.layout import block_size, equal, slots
from jmoe.dispatch.replicas import spread_plan
from jmoe.kernels.devices import row_alignment
from jmoe.types import Groups, Home, Layout, Plan, Rows
from jmoe.use import marked

Exchange = Callable[[Array], Array]

_WAYS = ("all_to_all", "ragged")


def check(
  config: Any, *, overlap: int = 1, by: str = "all_to_all", own_first: bool = False
) -> None:
  del config
  if by not in _WAYS:
    raise ValueError(f"by={by!r}: use one of {', '.join(map(repr, _WAYS))}.")
  if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 1:
    raise ValueError(f"overlap={overlap!r} must be a whole number of at least 1.")
  check_own_first(own_first, by, _WAYS[0])
  if own_first and overlap > 1:
    raise ValueError(
      f"overlap={overlap} with own_first=True; use overlap=1: what is a device's own "
      "already hides the exchange."
    )


def check_own_first(own_first: Any, by: str, default: str) -> None:
  """Raises unless it is false, or true and nothing else says how rows travel."""
  if not isinstance(own_first, bool):
    raise ValueError(f"own_first={own_first!r} must be True or False.")
  if own_first and by != default:
    raise ValueError(
      f"by={by!r} with own_first=True, which goes by permutations; leave out `by`."
    )


def check_overlap(capacity: int, overlap: int) -> None:
  """Raises unless slots can be cut into equal chunks."""
  if capacity % overlap:
    fits = [str(d) for d in range(1, capacity + 1) if capacity % d == 0]
    raise ValueError(
      f"overlap={overlap} does not divide the capacity of {capacity} slots; use "
      f"overlap={' or '.join(fits[:4])}, or capacity=use(capacity.by_factor, ..., "
      f"multiple_of={overlap})."
    )


def fits_mesh(
  config: Any, shape: tuple[int, ...], context: Any, train: bool, sizes: Mapping
) -> None:
  """Raises, before anything is traced, if slots cannot be cut into `overlap` chunks."""
  del shape, sizes
  if config.capacity is None or context.group_size is None:
    return
  size, E = context.group_size, config.num_experts
  found = of_group(config.capacity, size, size, E, config.k or 1, train)
  check_overlap(int(found.max()), config.dispatch.kwargs.get("overlap", 1))


@marked(dropless=False, exchanges=True, check=check, fits_mesh=fits_mesh)
def all_to_all(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  overlap: int = 1,
  by: str = "all_to_all",
  own_first: bool = False,
) -> Array:
  """Every device sends every expert as many rows: its slots.

  GShard (arXiv 2006.16468), section 3.2; `overlap` is Tutel's (arXiv 2206.03382): the
  slots are cut into chunks, so that one chunk travels while another is computed.

  Args:
    x_TD: this device's tokens.
    plan: of these, with a capacity.
    experts: this device's, rows -> [R,D].
    home: how outputs come home.
    axis: mesh axes over which the experts are; none: all are here, as for `buckets`.
    placement: the expert of each slot of these axes, if some are there twice.
    overlap: chunks; a divisor of the capacity.
    by: "all_to_all", XLA's collective, and a copy into the experts' order; "ragged",
      slots go straight to their places (`placed`), for GPUs of one host.
    own_first: this device's own slots are worked on while those of the others come, and
      those of the others leave while its own are: by permutations (`apart`).

  Returns:
    `[T,D]` or `[T,K,D]`; dropped assignments give zero.

  Raises:
    ValueError: a capacity that `overlap` does not divide.  A layer's configuration also
      refuses `own_first` beside another `by` or `overlap`.
  """

  if axis and own_first and lax.axis_size(axis) > 1:
    return _own_first(x_TD, plan, experts, home, placement, axis)
  if axis and by == "ragged":
    there = functools.partial(placed.slots_there, axis=axis)
    back = functools.partial(placed.slots_back, axis=axis)
    return exchanged(x_TD, plan, experts, home, there, back, placement, overlap, axis)

  def there(x_ESD: Array) -> Array:
    return lax.all_to_all(x_ESD, axis, 0, 1, tiled=True) if axis else x_ESD

  def back(y_eSD: Array) -> Array:
    return lax.all_to_all(y_eSD, axis, 1, 0, tiled=True) if axis else y_eSD

  return exchanged(x_TD, plan, experts, home, there, back, placement, overlap, axis)


def exchanged(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  there: Exchange,
  back: Exchange,
  placement: tuple[int, ...] | None,
  overlap: int,
  axis: tuple[str, ...],
) -> Array:
  """Buckets through an exchange: what strategies with a capacity share.

  Args:
    there: `[E,S,D]` slots of all experts -> `[E/n, n*S, D]` those of mine, from all.
    back: the reverse.
    Others: as for `all_to_all`.
  """
  check_overlap(slots(plan), overlap)
  x_ESD, layout = _slots(x_TD, plan, home, placement)
  parts = []
  for chunk in jnp.split(x_ESD, overlap, axis=1):
    x_eSD = there(chunk)
    y_RD = experts(_buffer(x_eSD, bool(axis)))
    parts.append(back(_of_slots(y_RD, x_eSD)))
  y_ESD = jnp.concatenate(parts, axis=1) if overlap > 1 else parts[0]
  return _home(y_ESD, home, layout)


def _own_first(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  placement: tuple[int, ...] | None,
  axis: tuple[str, ...],
) -> Array:
  """The same with slots in two buffers: this device's own, and the others'."""
  x_ESD, layout = _slots(x_TD, plan, home, placement)
  parts = apart.slots_apart(x_ESD, axis)
  found = carry.of_each(experts, tuple(_buffer(part, True) for part in parts))
  own_eSD, late_eND = map(_of_slots, found, parts)
  return _home(apart.slots_joined(own_eSD, late_eND, axis), home, layout)


def _slots(
  x_TD: Array, plan: Plan, home: Home, placement: tuple[int, ...] | None
) -> tuple[Array, Layout]:
  """`[E,S,D]` slots of all experts, scaled; nothing but slots travels."""
  plan = spread_plan(plan, placement)
  layout, scale = equal(plan, 1), None
  if home.input_scale is not None:
    scale = carry.spread(home.input_scale, layout)
  x_RD = Rows(x_TD, layout.groups, layout, scale).gathered()
  return x_RD.reshape(plan.load.shape[1], -1, x_RD.shape[1]), layout


def _home(y_ESD: Array, home: Home, layout: Layout) -> Array:
  y_RD = y_ESD.reshape(-1, y_ESD.shape[-1])
  return carry.home(y_RD, Home(home.weight, sums=home.sums), layout)


def _buffer(x_eSD: Array, travels: bool) -> Rows:
  """Equal groups for the experts; slots that nobody took are rows of zeros."""
  E, S, D = x_eSD.shape
  block = max(block_size(S), row_alignment(x_eSD.dtype))
  stride = -(-S // block) * block
  x_eSD = jnp.pad(x_eSD, ((0, 0), (0, stride - S), (0, 0)))
  start_E = jnp.arange(E, dtype=jnp.int32) * stride
  groups = Groups(start_E, jnp.full_like(start_E, S), block, capacity=stride)
  return Rows(x_eSD.reshape(E * stride, D), groups, travels=travels)


def _of_slots(y_RD: Array, x_eSD: Array) -> Array:
  """`[e,S,D]` of the rows that are slots."""
  E, S, _ = x_eSD.shape
  return y_RD.reshape(E, y_RD.shape[0] // E, -1)[:, :S]
