"""A device's own rows, and those of the others apart, which come by permutations.

Work on one's own can begin at once and hides what travels, and what is made for others
can leave while one's own is made.  The others come in a circle, the next device first,
each by a collective permutation: between GPUs of one host XLA can leave these to the
copy engines, which take no multiprocessor from what runs beside them.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch.exchange import Axis, room
from jmoe.kernels.varying import over
from jmoe.types import wide


def others(tree: Any, axis: Axis) -> Any:
  """`[(n-1)*T, ...]` the rows of all other devices, the next one's first.

  Args:
    tree: of arrays `[T, ...]`.
    axis: mesh axes over which the n devices are; two or more.
  """

  return jax.tree.map(lambda x: _others(over(x, axis), axis), tree)


def from_others(y_ND: Array, axis: Axis) -> Array:
  """`[T, ...]` sums, in float32, of what the others have for this device.

  It is `others` turned round, and each is the other's gradient.
  """
  return _from_others(over(y_ND, axis), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _others(x: Array, axis: Axis) -> Array:
  return _end_to_end([_from(x, shift, axis) for shift in _shifts(axis)], axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _from_others(y_ND: Array, axis: Axis) -> Array:
  parts = jnp.split(y_ND, lax.axis_size(axis) - 1)
  come = [_from(y, -shift, axis) for shift, y in zip(_shifts(axis), parts, strict=True)]
  if len(come) == 1:
    return come[0]
  total = functools.reduce(jnp.add, [y.astype(wide(y)) for y in come])
  return total.astype(y_ND.dtype)


def _of_others(axis: Axis, _: None, grad: Array) -> tuple[Array | None]:
  whole_numbers = grad.dtype == jax.dtypes.float0  # as experts' are
  return (None if whole_numbers else _from_others(grad, axis),)


_others.defvjp(lambda x, axis: (_others(x, axis), None), _of_others)
_from_others.defvjp(
  lambda y, axis: (_from_others(y, axis), None),
  lambda axis, _, grad: (_others(grad, axis),),
)


def slots_apart(x_ESD: Array, axis: Axis) -> tuple[Array, Array]:
  """`[E/n, S, D]` and `[E/n, (n-1)*S, D]`: this device's experts' slots.

  Args:
    x_ESD: slots of all experts, on each device.
    axis: mesh axes over which the experts are; two devices or more.

  Returns:
    One's own, and those of the others, the next device's first.
  """
  return _slots_apart(over(x_ESD, axis), axis)


def slots_joined(own_eSD: Array, late_eND: Array, axis: Axis) -> Array:
  """`[E,S,D]` from both parts on each device: `slots_apart` turned round."""
  return _slots_joined(over(own_eSD, axis), over(late_eND, axis), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slots_apart(x_ESD: Array, axis: Axis) -> tuple[Array, Array]:
  late = [_from(_of(x_ESD, -shift, axis), shift, axis) for shift in _shifts(axis)]
  return _of(x_ESD, 0, axis), _end_to_end(late, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _slots_joined(own_eSD: Array, late_eND: Array, axis: Axis) -> Array:
  n = lax.axis_size(axis)
  come = [
    _from(y_eSD, -shift, axis)
    for shift, y_eSD in zip(
      _shifts(axis), jnp.split(late_eND, n - 1, axis=1), strict=True
    )
  ]
  local, S, D = own_eSD.shape
  blank = room(n * local * S, own_eSD.reshape(-1, D), zero=False)
  joined_ESD = blank.reshape(n * local, S, D)
  for shift, y_eSD in enumerate([own_eSD, *come]):
    first = _device(-shift, axis) * local
    joined_ESD = lax.dynamic_update_slice_in_dim(joined_ESD, y_eSD, first, 0)
  return joined_ESD


_slots_apart.defvjp(
  lambda x, axis: (_slots_apart(x, axis), None),
  lambda axis, _, grads: (_slots_joined(*grads, axis),),
)
_slots_joined.defvjp(
  lambda own, late, axis: (_slots_joined(own, late, axis), None),
  lambda axis, _, grad: _slots_apart(grad, axis),
)


def _from(x: Array, shift: int, axis: Axis) -> Array:
  """What the device so many places further on has here."""
  n = lax.axis_size(axis)
  return lax.ppermute(over(x, axis), axis, [(i, (i - shift) % n) for i in range(n)])


def _of(x_ESD: Array, shift: int, axis: Axis) -> Array:
  """Slots of the experts of the device so many places further on."""
  local = x_ESD.shape[0] // lax.axis_size(axis)
  return lax.dynamic_slice_in_dim(x_ESD, _device(shift, axis) * local, local)


def _device(shift: int, axis: Axis) -> Array:
  return (lax.axis_index(axis) + shift) % lax.axis_size(axis)


def _shifts(axis: Axis) -> range:
  return range(1, lax.axis_size(axis))


def _end_to_end(parts: list[Array], axis: int) -> Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
