"""Tiles of the grouped matmul in Pallas's Triton, and how they are multiplied."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_ONE, _THREE = (
  lax.DotAlgorithmPreset.TF32_TF32_F32,
  lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
)
_ASKED = {  # of jax's default precision -> of float32 tiles
  "tensorfloat32": _ONE,
  "tf32_tf32_f32": _ONE,
  "high": _THREE,
  "tf32_tf32_f32_x3": _THREE,
}


@dataclasses.dataclass(frozen=True)
class Tile:
  """An output tile of one program.

  Args:
    rows, cols: of the output.
    depth: of the contracted dimension in a step.
    warps: that share it.
    stages: steps whose operands are on their way or in shared memory.
    band: row tiles that are walked before the next column tile.
  """

  rows: int
  cols: int
  depth: int
  warps: int = 4
  stages: int = 3
  band: int = 8


def row_tile(block: int) -> int:
  """Rows of a tile for a layout aligned to `block`, a multiple of 16."""
  return next(rows for rows in (64, 32, 16) if block % rows == 0)


def rows_tile(rows: int, cols: int, dtype: Any) -> Tile:
  """The tile for rows times matrices.

  Two at a time fit the registers of a multiprocessor, and the 100 KiB of shared memory
  that small chips have.

  Args:
    rows: of a tile, from `row_tile`.
    cols: of the output.
    dtype: of the operands.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return Tile(rows, 128 if cols > 64 else 64, 16, stages=4)
  if rows == 64:
    return Tile(rows, 256 if cols > 128 else 128, 32)
  return Tile(rows, 128, 64)  # few rows: what counts is how fast matrices come


def matrices_tile(cols: int, depth: int, dtype: Any) -> Tile:
  """The tile for a matrix's gradient.

  Args:
    cols: of the matrix.
    depth: rows to which the layout is aligned, from `row_tile`.
    dtype: of the operands.
  """
  width = 128 if cols > 64 else 64
  if jnp.dtype(dtype) == jnp.float32:
    return Tile(64, width, 16, stages=4)
  return Tile(128, width, min(depth, 32))


def precision(dtype: Any) -> Any:
  """How tiles are multiplied.

  Float32 products are float32's own, outside of the tensor cores.  Their TF32 products
  keep three digits, and three of them a product keep less than float32 in deep sums,
  which tensor cores truncate; both are for who asks jax for them, by
  `jax.default_matmul_precision("tensorfloat32")` and `"high"`.
  """
  if jnp.dtype(dtype) != jnp.float32:
    return lax.Precision.DEFAULT  # exact products, float32 sums
  asked: Any = getattr(jax.config, "jax_default_matmul_precision", None)
  return _ASKED.get(str(asked).lower(), lax.Precision.HIGHEST)
