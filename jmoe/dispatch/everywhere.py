"""Rows to all devices, and sums of theirs home, as exchanges of equal parts.

What an all-gather and a reduce-scatter give, by all-to-alls: the copy of a device's own
rows and the sum are then passes of their own, which XLA may fuse with what is beside
them, and the exchange is nothing but copies.  Each is the other's gradient.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.varying import over


def gathered(x: Array, axis: tuple[str, ...]) -> Array:
  """[n*T,...] the rows of all n devices, in their order, from [T,...] of each."""
  n = lax.axis_size(axis)
  # Copied in the dtype of sums, as the gradient is the sum over the copies.
  wide = over(x, axis).astype(_of_sums(x))
  x_n = jnp.broadcast_to(wide, (n, *x.shape)).astype(x.dtype)
  return lax.all_to_all(x_n, axis, 0, 0, tiled=True).reshape(-1, *x.shape[1:])


def scattered(y: Array, axis: tuple[str, ...]) -> Array:
  """[T,...] sums, in float32 or wider, of what all n devices have of this one's rows.

  Args:
    y: [n*T,...] of each.
    axis: mesh axes over which the devices are.
  """
  n = lax.axis_size(axis)
  y_n = y.reshape(n, -1, *y.shape[1:])
  come_n = lax.all_to_all(over(y_n, axis), axis, 0, 0, tiled=True)
  return jnp.sum(come_n, axis=0, dtype=_of_sums(y)).astype(y.dtype)


def _of_sums(x: Array) -> Any:
  return x.dtype if x.dtype.itemsize > 4 else jnp.float32
