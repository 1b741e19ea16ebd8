"""Other ways to the results of a gather and of a scattered sum, timed beside XLA's own.

An all-gather copies a device's own rows too, and a scattered sum adds in the kernel
that receives; an exchange does neither, so whether the copy or the sum by itself costs
less is a question for a measurement.  Each function's result is that of the collective
in its name, but for the order of rows where it says so.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch.everywhere import gathered, scattered

Axis = tuple[str, ...]
CHUNKS = 4

# XLA's own copies between the GPUs of one process: no thread block of any kernel moves
# a byte, so that kernels that take every multiprocessor run beside them.
COPIES: dict[str, str | bool] = {
  "xla_gpu_use_memcpy_local_p2p": True,
  "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
}

gather_by_all_to_all: Callable[[Array, Axis], Array] = gathered
scatter_by_all_to_all: Callable[[Array, Axis], Array] = scattered


def gather_by_ppermute(x_TD: Array, axis: Axis) -> Array:
  """[n*T,D]: a device's own rows first, then those of the ones before it."""
  parts = [x_TD]
  for shift in range(1, lax.axis_size(axis)):
    parts.append(lax.ppermute(x_TD, axis, _ring(shift, lax.axis_size(axis))))
  return jnp.concatenate(parts)


def scatter_by_ppermute(y_ND: Array, axis: Axis) -> Array:
  """[N/n,D] sums in float32 of what all devices have for this one."""
  n, me = lax.axis_size(axis), lax.axis_index(axis)
  y_nTD = y_ND.reshape(n, -1, y_ND.shape[-1])

  def part(shift: int) -> Array:
    return lax.dynamic_index_in_dim(y_nTD, (me + shift) % n, keepdims=False)

  total_TD = part(0).astype(jnp.float32)
  for shift in range(1, n):
    come_TD = lax.ppermute(part(shift), axis, _ring(shift, n))
    total_TD += come_TD.astype(jnp.float32)
  return total_TD.astype(y_ND.dtype)


def gather_in_chunks(x_TD: Array, axis: Axis) -> Array:
  """[n*T,D]: the first chunk of all devices, then their next ones."""
  parts = [lax.all_gather(x, axis, tiled=True) for x in jnp.split(x_TD, CHUNKS)]
  return jnp.concatenate(parts)


def scatter_in_chunks(y_ND: Array, axis: Axis) -> Array:
  """[N/n,D]: each device's rows are cut into chunks, and these are summed in turn."""
  y_nTD = y_ND.reshape(lax.axis_size(axis), -1, y_ND.shape[-1])
  parts = [
    lax.psum_scatter(y, axis, tiled=False) for y in jnp.split(y_nTD, CHUNKS, axis=1)
  ]
  return jnp.concatenate(parts)


def _ring(shift: int, n: int) -> list[tuple[int, int]]:
  """Each device sends to the one `shift` places behind it."""
  return [(i, (i + shift) % n) for i in range(n)]
