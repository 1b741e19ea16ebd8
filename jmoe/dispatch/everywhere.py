"""Rows to all devices, and sums of theirs home, as exchanges of equal parts.

What an all-gather and a reduce-scatter give, by all-to-alls: the copy of a device's own
rows and the sum are then passes of their own, which XLA may fuse with what is beside
them, and the exchange is nothing but copies.  Each is the other's gradient.
"""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.varying import over


def gathered(x: Array, axis: tuple[str, ...]) -> Array:
  """[n*T,...] the rows of all n devices, in their order, from [T,...] of each."""
  n = lax.axis_size(axis)
  x_n = jnp.broadcast_to(over(x, axis), (n, *x.shape))
  return lax.all_to_all(x_n, axis, 0, 0, tiled=True).reshape(-1, *x.shape[1:])


def scattered(y: Array, axis: tuple[str, ...]) -> Array:
  """[T,...] sums, in float32, of what all n devices have of this one's rows.

  Args:
    y: [n*T,...] of each.
    axis: mesh axes over which the devices are.
  """
  n = lax.axis_size(axis)
  y_n = y.reshape(n, -1, *y.shape[1:])
  come_n = lax.all_to_all(over(y_n, axis), axis, 0, 0, tiled=True)
  return jnp.sum(come_n, axis=0, dtype=jnp.float32).astype(y.dtype)
