"""The one matmul of routing: never below float32, never in fewer passes."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import wide


def product(subscripts: str, a: Array, b: Array) -> Array:
  """`einsum` at `Precision.HIGHEST` in at least float32; so are its gradients."""
  dtype = wide(a, b)
  return jnp.einsum(
    subscripts, a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )
