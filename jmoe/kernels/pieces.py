"""A feed-forward's largest arrays in pieces, so that no whole one need exist.

Columns are cut anywhere: a piece of `[R,D]` has its own sums per token, and its own
columns or rows of a gradient, so nothing is added up over pieces.  Rows are cut at a
block: an expert on both sides is then in both parts, which only kernels whose results
are rows may have.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jmoe.types import Groups, Layout


@dataclasses.dataclass(frozen=True)
class Columns:
  """Some columns of an array: the first, how many, and of how many."""

  first: int
  size: int
  total: int

  @property
  def whole(self) -> bool:
    return self.size == self.total


def columns(total: int, pieces: int, tile: int | None = None) -> list[Columns]:
  """At most that many, of whole tiles but for the last, none narrower than 128."""
  tile = tile or (256 if total >= 512 else 128)
  size = -(-total // (tile * pieces)) * tile
  firsts = [n for n in range(0, total, size) if not n or total - n >= 128]
  ends = [*firsts[1:], total]
  return [Columns(n, end - n, total) for n, end in zip(firsts, ends, strict=True)]


@dataclasses.dataclass(frozen=True)
class Part:
  """Some rows of a buffer, in an array of their own: as `Columns`, for rows."""

  first: int
  size: int
  total: int

  def in_whole(self, row: Any) -> Any:
    """The buffer's row, from the part's; both may be those of several models."""
    model = lax.div(row, jnp.int32(self.size))
    return row + (model * (self.total - self.size) + self.first)

  def groups(self, groups: Groups) -> Groups:
    """Where each expert's rows are within the part."""
    end_E = groups.start + groups.rows
    start_E = jnp.clip(groups.start - self.first, 0, self.size)
    rows_E = jnp.clip(end_E - self.first, 0, self.size) - start_E
    return Groups(start_E, jnp.maximum(rows_E, 0), groups.block)

  def layout(self, layout: Layout) -> Layout:
    """Where each assignment lies within the part, if it does."""
    row_N = layout.row - self.first
    inside_N = (row_N >= 0) & (row_N < self.size)
    rows = slice(self.first, self.first + self.size)
    return dataclasses.replace(
      layout,
      token=layout.token[rows],
      entry=layout.entry[rows],
      row=jnp.where(inside_N, row_N, self.size),
      groups=self.groups(layout.groups),
    )


def parts(total: int, pieces: int, block: int) -> list[Part]:
  """At most that many, of whole blocks."""
  size = -(-total // (block * pieces)) * block
  return [
    Part(first, min(size, total - first), total) for first in range(0, total, size)
  ]


def put(whole: Array | None, piece: Array, at: Columns) -> Array:
  """The array with a piece in its columns; None: one that holds nothing else yet."""
  if at.whole:
    return piece
  if whole is None:
    return jnp.pad(piece, ((0, 0), (at.first, at.total - at.first - at.size)))

  @custom_vmap
  def write(whole, piece):
    first = (0,) * (whole.ndim - 1) + (at.first,)
    return lax.dynamic_update_slice(whole, piece, first)

  @write.def_vmap
  def _(size, batched, *arrays):  # jax's own rule makes a scatter of it
    shared = zip(arrays, batched, strict=True)
    return write(
      *[a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in shared]
    ), True

  return write(whole, piece)


def after(*trees: Any) -> Any:
  """The same trees, none of which is read before all of them are there."""
  return lax.optimization_barrier(trees)
