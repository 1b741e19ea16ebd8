"""jax's own Pallas kernels for Hopper's ragged products, which have no gradient.

They come with jax as examples; the gradient is given to them here.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from experiments.benchmarks.peers import ours
from experiments.benchmarks.shapes import Shape

_TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4}


def missing(_: str) -> str | None:
  """Why it cannot run here; None: it can."""
  try:
    from jax.experimental.pallas.ops.gpu import (  # noqa: F401
      ragged_dot_mgpu,
      transposed_ragged_dot_mgpu,
    )
  except ImportError as error:
    return f"jax {jax.__version__} does not have them: {error}"
  return None if on_hopper() else "needs a Hopper GPU"


def on_hopper() -> bool:
  from jmoe.kernels.devices import current_device

  return current_device() == "hopper"


def ragged_dot(*, rows: int = 4, matrices: int = 2) -> Callable[..., Array]:
  """`(x, w, sizes) -> y` with a gradient.

  Args:
    rows, matrices: column tiles in a band, of products that give rows and matrices.
  """
  from jax.experimental.pallas.ops import gpu

  ops: Any = gpu  # imported by `missing`
  to_rows = ops.ragged_dot_mgpu.ragged_dot
  to_matrices = ops.transposed_ragged_dot_mgpu.transposed_ragged_dot

  @jax.custom_vjp
  def dot(x, w, sizes):
    return to_rows(x, w, group_sizes=sizes, **_TILE, grid_block_n=rows)

  def forward(x, w, sizes):
    return dot(x, w, sizes), (x, w, sizes)

  def backward(kept, dy):
    x, w, sizes = kept
    dx = to_rows(
      dy, w, group_sizes=sizes, **_TILE, grid_block_n=rows, transpose_rhs=True
    )
    dw = to_matrices(x, dy, group_sizes=sizes, **_TILE, grid_block_n=matrices)
    return dx, dw, None

  dot.defvjp(forward, backward)
  return dot


def layer(shape: Shape) -> Callable[..., Array]:
  return ours.plain(shape, ragged_dot(), both_ways=True)


LAYERS = {"jax's mgpu kernels": layer}
