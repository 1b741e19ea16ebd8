"""The blocks of a layout that hold rows, and the order in which kernels walk over them.

A layout is aligned: no block of `size` rows has rows of two experts, so that a tile of
as many rows needs one matrix and no mask.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.counting import places, running
from jmoe.types import Groups, pytree


@pytree
class Blocks:
  """The blocks that hold rows, in the order of experts."""

  expert: Array  # i32[R / size]  of each used block
  block: Array  # i32[R / size]  where it is: its first row is `size` times this
  used: Array  # i32[1]  how many are used, at least one


def used_blocks(groups: Groups, num_rows: int, size: int) -> Blocks:
  """The blocks of a layout that is aligned to `size` rows.

  Args:
    groups: where each expert's rows are.
    num_rows: R of the buffer.
    size: rows of a block.
  """
  assert groups.block % size == 0, (groups.block, size)
  E, B = groups.start.shape[0], num_rows // size
  count_E = -(-groups.rows // size)
  end_E = running(count_E)
  place_B = jnp.arange(B, dtype=jnp.int32)
  expert_B = jnp.minimum(places(end_E, place_B, side="right"), E - 1)
  first_E = groups.start // size - (end_E - count_E)
  block_B = jnp.clip(place_B + first_E[expert_B], 0, B - 1)
  # Where no expert has a row, one block that nobody reads is made all the same.
  return Blocks(expert_B, block_B, jnp.maximum(end_E[-1:], 1))


def in_bands(t: Array, rows: Array, cols: int, band: int) -> tuple[Array, Array]:
  """(row, column) of the t-th tile of a grid, whose rows may be traced.

  Bands of `band` rows from top to bottom; in a band column by column.
  """
  which = lax.div(t, jnp.int32(band * cols))
  within = t - which * (band * cols)
  height = jnp.minimum(jnp.int32(band), rows - which * band)
  return which * band + lax.rem(within, height), lax.div(within, height)


def expert_of_rows(groups: Groups, num_rows: int, size: int) -> Array:
  """i32[R] of every row that exists; anything in range for the others."""
  inside_BE = _inside(groups, num_rows, size)
  return jnp.repeat(jnp.argmax(inside_BE, axis=1).astype(jnp.int32), size)


def in_used_blocks(groups: Groups, num_rows: int, size: int) -> Array:
  """bool[R] whether a row's block holds any expert's rows: `Blocks` as a mask."""
  assert groups.block % size == 0, (groups.block, size)
  used_B = jnp.any(_inside(groups, num_rows, size), axis=1)
  return jnp.repeat(used_B, size)


def _inside(groups: Groups, num_rows: int, size: int) -> Array:
  """bool[R/size, E] whether an expert has rows in a block."""
  block_B = jnp.arange(num_rows // size, dtype=jnp.int32) * size
  end_E = groups.start + -(-groups.rows // size) * size
  return (block_B[:, None] >= groups.start) & (block_B[:, None] < end_E)


def sums(y_RF: Array, groups: Groups, size: int) -> Array:
  """f32[E,F] sums of each expert's rows, by blocks; no other row counts."""
  R, F = y_RF.shape
  place_R = jnp.arange(R, dtype=jnp.int32)
  expert_R = expert_of_rows(groups, R, size)
  real_R = (place_R >= groups.start[expert_R]) & (
    place_R < groups.start[expert_R] + groups.rows[expert_R]
  )
  y_RF = jnp.where(real_R[:, None], y_RF, 0).astype(jnp.float32)
  sum_BF = jnp.sum(y_RF.reshape(-1, size, F), axis=1)
  E = groups.start.shape[0]
  own_EB = jnp.arange(E, dtype=jnp.int32)[:, None] == expert_R[::size]
  return jnp.matmul(
    own_EB.astype(jnp.float32), sum_BF, precision=jax.lax.Precision.HIGHEST
  )
