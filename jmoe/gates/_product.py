"""The one matmul of routing: never below float32, never in fewer passes.

On NVIDIA GPUs bfloat16 tokens are multiplied on tensor cores by three bfloat16 parts of
a float32 matrix, whose sum it is; float32's own units take five times as long.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.split_product import split_product, splits
from jmoe.types import wide


def product(subscripts: str, a: Array, b: Array) -> Array:
  """`einsum` of tokens and a matrix in at least float32; so are its gradients.

  At `Precision.HIGHEST`, or to the same accuracy by `split_product`, which `jax.jvp`
  refuses, as it does a whole layer.
  """
  if splits(a, b):
    return split_product(subscripts, a, b)
  dtype = wide(a, b)
  return jnp.einsum(
    subscripts, a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )
