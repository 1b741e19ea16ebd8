"""Equal pieces of rows, each put where its receiver wants it: a ragged all-to-all.

An all-to-all lays what it brings in the order of the senders, and the experts want it
in theirs: a copy each way.  XLA's ragged all-to-all is told where every piece goes.
Between GPUs of one host it is a kernel that writes straight into the others' memory;
between hosts each piece is a message of its own, which is slow.  On CPUs, which lack
it, the collective that gives the same array stands in.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jmoe.dispatch.exchange import PIECES, Axis, cut, number_of_pieces, room
from jmoe.kernels.devices import current_device
from jmoe.kernels.varying import over, together

# i32[n,K] each: the first rows of K pieces for each of n receivers, here and there.
Places = tuple[Array, Array]


def slots_there(x_ESD: Array, axis: Axis) -> Array:
  """`[E/n, n*S, D]` slots of this device's experts, from `[E,S,D]` of each.

  As `lax.all_to_all(x_ESD, axis, 0, 1, tiled=True)`.
  """
  return _slots_there(over(x_ESD, axis), axis)


def slots_back(y_eSD: Array, axis: Axis) -> Array:
  """`[E,S,D]` from `[E/n, n*S, D]`: the reverse of `slots_there`."""
  return _slots_back(over(y_eSD, axis), axis)


def gathered(x_TD: Array, axis: Axis) -> Array:
  """`[n*T, D]` the rows of all devices, as `lax.all_gather`; the gradient is a sum."""
  return _gathered(over(x_TD, axis), axis)


def scattered(y_ND: Array, axis: Axis) -> Array:
  """`[N/n, D]`, as `lax.psum_scatter`; the gradient is gathered."""
  return _scattered(over(y_ND, axis), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slots_there(x_ESD: Array, axis: Axis) -> Array:
  if current_device() == "cpu":
    return lax.all_to_all(x_ESD, axis, 0, 1, tiled=True)
  n, (E, S, D) = lax.axis_size(axis), x_ESD.shape
  places = functools.partial(out_of_slots, n=n, local=E // n, size=S)
  y_RD = _put(x_ESD.reshape(E * S, D), places, S, E * S, axis)
  return y_RD.reshape(E // n, n * S, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slots_back(y_eSD: Array, axis: Axis) -> Array:
  if current_device() == "cpu":
    return lax.all_to_all(y_eSD, axis, 1, 0, tiled=True)
  n, (local, rows, D) = lax.axis_size(axis), y_eSD.shape
  S = rows // n
  places = functools.partial(into_slots, n=n, local=local, size=S)
  x_RD = _put(y_eSD.reshape(local * rows, D), places, S, local * rows, axis)
  return x_RD.reshape(n * local, S, D)


_slots_there.defvjp(
  lambda x, axis: (_slots_there(x, axis), None),
  lambda axis, _, grad: (_slots_back(grad, axis),),
)
_slots_back.defvjp(
  lambda y, axis: (_slots_back(y, axis), None),
  lambda axis, _, grad: (_slots_there(grad, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x_TD: Array, axis: Axis) -> Array:
  if current_device() == "cpu":
    return lax.all_gather(x_TD, axis, tiled=True)
  n, T = lax.axis_size(axis), x_TD.shape[0]
  places = functools.partial(behind_each_other, n=n, size=T)
  found = _put(x_TD.reshape(T, -1), places, T, n * T, axis)  # [T,K,D] too
  return found.reshape(n * T, *x_TD.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scattered(y_ND: Array, axis: Axis) -> Array:
  return lax.psum_scatter(y_ND, axis, tiled=True)


_gathered.defvjp(
  lambda x, axis: (_gathered(x, axis), None),
  lambda axis, _, grad: (_scattered(grad, axis),),
)
_scattered.defvjp(
  lambda y, axis: (_scattered(y, axis), None),
  lambda axis, _, grad: (_gathered(grad, axis),),
)


def out_of_slots(me: Any, n: int, local: int, size: int) -> Places:
  """Slots of each of all experts go where the device of the expert keeps its own."""
  i, d = _counted(local), _counted(n)[:, None]
  return (d * local + i) * size, jnp.broadcast_to((i * n + me) * size, (n, local))


def into_slots(me: Any, n: int, local: int, size: int) -> Places:
  """The reverse."""
  i, d = _counted(local), _counted(n)[:, None]
  return (i * n + d) * size, jnp.broadcast_to((me * local + i) * size, (n, local))


def behind_each_other(me: Any, n: int, size: int) -> Places:
  """All rows to every device, one device's behind those of the one before."""
  return jnp.zeros((n, 1), jnp.int32), jnp.full((n, 1), me * size)


def cut_up(places: Places, size: int) -> tuple[Array, Array, Array]:
  """i32[N] first rows, sizes, and first rows at the receivers, of smaller pieces."""
  n, K = places[0].shape
  pieces = max(1, min(number_of_pieces(size, 1), PIECES // K))
  first_P, size_P = cut(jnp.full(1, size, jnp.int32), pieces)
  sizes = jnp.broadcast_to(size_P, (n, K, pieces)).reshape(-1)
  first, to = ((place[:, :, None] + first_P).reshape(-1) for place in places)
  return first, sizes, to


def _put(
  rows_ND: Array,
  places: Callable[[Array], Places],
  size: int,
  num_rows: int,
  axis: Axis,
) -> Array:
  """`[num_rows, D]`, every row of which must be of somebody's piece of `size` rows.

  Args:
    rows_ND: what this device sends.
    places: which of the devices this is -> where the pieces are and go.
    size, num_rows, axis: see above.
  """

  @custom_vmap
  def put(rows_ND):
    first, sizes, to = cut_up(places(lax.axis_index(axis).astype(jnp.int32)), size)
    blank = room(num_rows, rows_ND, zero=False)
    rows_ND, blank, *arrays = together(rows_ND, blank, first, sizes, to, sizes)
    return lax.ragged_all_to_all(rows_ND, blank, *arrays, axis_name=axis)

  @put.def_vmap
  def _(models, batched, rows_MND):  # their rows side by side: the places are the same
    del batched
    wide_NX = jnp.swapaxes(rows_MND, 0, 1).reshape(rows_MND.shape[1], -1)
    found_RMD = put(wide_NX).reshape(num_rows, models, -1)
    return jnp.swapaxes(found_RMD, 0, 1), True

  return put(rows_ND)


def _counted(count: int) -> Array:
  return jnp.arange(count, dtype=jnp.int32)
