"""Which implementation serves which device."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import current_device, has_triton

_MOST = 16  # choices, each a pass over a row that is on the chip
_WIDEST = 4096  # columns that a program holds


def top_k(values: Array, k: int) -> Array:
  """i32[...,K] where the k highest of the last dimension are, the highest first.

  Like the indices of `jax.lax.top_k`: equal values in the order of their places, a NaN
  above all others.  On GPUs that one sorts whole rows.  It has no gradient.

  Args:
    values: float[...,E].
    k: from 1 to E.
  """
  values = jax.lax.stop_gradient(values)
  if not _served(values, k):
    return jax.lax.top_k(values, k)[1].astype(jnp.int32)
  from jmoe.kernels.top_k import triton  # imports Pallas

  flat = values.reshape(-1, values.shape[-1])
  return triton.top_k(flat, k).reshape(*values.shape[:-1], k)


def _served(values: Array, k: int) -> bool:
  """Whether Triton's kernel takes them."""
  if current_device() not in ("ampere", "hopper"):
    return False
  new = jax.__version_info__ >= (0, 10) and has_triton()
  kind = values.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
  fits = 1 <= k <= _MOST and values.shape[-1] <= _WIDEST
  return new and kind and fits and values.size > 0
