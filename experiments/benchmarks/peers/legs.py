"""The six grouped matmuls of a layer, one by one: where its time must go."""
# SPDX-License-Identifier: Apache-2.0

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.shapes import Shape, seconds
from jmoe.types import Groups

BLOCK = 128


def measured(shape: Shape, expert_TK: Any) -> dict[str, float]:
  """FLOP/s of each leg; of rows that exist, not of padding."""
  from jmoe.kernels.grouped_matmul import hopper as kernels

  loads = np.bincount(expert_TK.reshape(-1), minlength=shape.num_experts)
  padded = -(-loads // BLOCK) * BLOCK
  R = expert_TK.size + (BLOCK - 1) * shape.num_experts
  R = R // BLOCK * BLOCK
  groups = Groups(
    jnp.asarray(np.cumsum(padded) - padded, jnp.int32),
    jnp.asarray(loads, jnp.int32),
    BLOCK,
  )
  D, F, E = shape.d_model, shape.d_ff, shape.num_experts
  key = jax.random.key(0)
  x, h = (jax.random.normal(key, (R, n), jnp.bfloat16) for n in (D, F))
  wide = jax.random.normal(key, (E, D, F), jnp.bfloat16)
  tall = jax.random.normal(key, (E, F, D), jnp.bfloat16)

  def rows(transpose):
    return jax.jit(lambda x, w: kernels.rows(((x, w),), groups, transpose=transpose))

  plain, transposed = rows(False), rows(True)
  matrices = jax.jit(lambda x, y: kernels.matrices([x], [y], [groups]))
  legs = {
    "up": lambda: plain(x, wide),
    "down": lambda: plain(h, tall),
    "dx of up": lambda: transposed(h, wide),
    "dx of down": lambda: transposed(x, tall),
    "dw of up": lambda: matrices(x, h),
    "dw of down": lambda: matrices(h, x),
  }
  flops = 2.0 * expert_TK.size * D * F
  return {
    name: flops / statistics.median(seconds(leg, repeats=3, inner=4))
    for name, leg in legs.items()
  }
