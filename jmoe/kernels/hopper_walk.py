"""How a thread block on Hopper walks over its share of the output tiles.

One warpgroup copies tiles of the operands ahead into shared memory (TMA), two multiply
them: a ring of slots that runs on from one output tile to the next.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import Tile

_COPYING, _COMPUTING = 40, 232  # registers of a thread
_COPIER = 2  # which warpgroup copies


@dataclasses.dataclass(frozen=True)
class Operand:
  """What each step reads a tile of.

  Args:
    width: of its tile, across the contracted dimension, of which a step reads `depth`.
    axis: which of the two dimensions is contracted.
    dtype: of 16 bits, or of eight with the last dimension contracted.
    source: (which output tile) -> the part of it in global memory that holds its tiles.
    origin: (which output tile) -> the first of them.
    shared: the thread blocks of a cluster read the same.
    others: sources and origins of further arrays, which are read behind the first.
  """

  width: int
  axis: int
  dtype: Any
  source: Callable[[Any], Any]
  origin: Callable[[Any], Any] = lambda _: 0
  shared: bool = False
  others: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...] = ()

  @property
  def depth(self) -> int:
    return chip.depth(self.dtype)

  @property
  def shape(self) -> tuple[int, int]:
    return (self.width, self.depth) if self.axis == 1 else (self.depth, self.width)

  @property
  def transforms(self) -> tuple[Any, ...]:
    return chip.swizzled(self.dtype, self.depth)

  def arrays(self, which: Any) -> list[tuple[Any, Any]]:
    """(what holds an output tile's tiles, the first of them) of each array."""
    each = ((self.source, self.origin), *self.others)
    return [(source(which), origin(which)) for source, origin in each]


@dataclasses.dataclass(frozen=True)
class Work:
  """What is done for an output tile.

  Args:
    arguments: (number) -> which output tile that is, for the functions below and those
      of the operands.
    steps: (which) -> how many, over each of the operands' arrays in turn.
    make: (warpgroup, which, scratch, over); makes a tile, or its part; `over(totals)`
      runs all steps.
    step: (k, warpgroup, which, scratch, tiles, totals); issues one step's products,
      which the walk waits for.
    products: how many these are.
  """

  arguments: Callable[[Array], Any]
  steps: Callable[[Any], Sequence[Any]]
  make: Callable[..., None]
  step: Callable[..., None]
  products: int = 1

  def total(self, which: Any) -> Any:
    """Steps over all arrays."""
    return sum(self.steps(which))


def share(block: Any, count: Any, blocks: int, waves: int) -> tuple[Any, Any]:
  """(its first tile, how many it makes, each `blocks` behind the last) of a block.

  The blocks of a wave make as many tiles each, one or none more than others, and those
  of the next wave go on where they end: tiles come in the order of one wave.
  """
  rounds = lax.div(count + (blocks - 1), jnp.int32(blocks))
  most = lax.div(rounds + (waves - 1), jnp.int32(waves))
  wave = lax.div(block, jnp.int32(blocks))
  first = block + wave * (most - 1) * blocks
  left = lax.div(count - first + (blocks - 1), jnp.int32(blocks))
  return first, jnp.clip(left, 0, most)


def walk(
  operands: Sequence[Operand],
  work: Work,
  *,
  tile: Tile,
  count: Array,
  blocks: int,
  waves: int = 1,
  scratch: Mapping[str, Any],
) -> None:
  """Makes this thread block's output tiles.

  The ring is never drained, also where depths are data, as those of matrices' gradients
  are.  Either both warpgroups make one output tile together, or each makes every other
  tile by itself (ping-pong): what one does behind its products, activations and stores,
  then goes on under the products of the other.

  Args:
    operands: of each step.
    work: on a tile.
    tile: how tiles are made.
    count: output tiles, those of a cluster's thread blocks being one.
    blocks: thread blocks of a lot, or clusters of them.
    waves: lots.
    scratch: shared memory and barriers by name.
  """
  stages, makers = tile.stages, 2 if tile.alternating else 1
  arrivals = 3 - makers
  consumed: Any = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
  if tile.cluster > 1:
    consumed = plgpu.ClusterBarrier(
      collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=stages
    )
  slots = [
    plgpu.SMEM((stages, *one.shape), one.dtype, transforms=one.transforms)
    for one in operands
  ]
  # A barrier is waited for by one side at every turn, or it would lose count: what has
  # come is told to whoever makes the tile, on barriers of its own.
  produced = plgpu.Barrier(num_arrivals=len(operands), num_barriers=(makers, stages))
  begin, mine = share(lax.axis_index("sm"), count, blocks, waves)

  def each(body):
    """`body(i, which, its first step)` for this block's tiles; the number of steps."""

    def one(i, first):
      which = work.arguments(begin + i * blocks)
      body(i, which, first)
      return first + jnp.int32(work.total(which))

    return lax.fori_loop(0, mine, one, jnp.int32(0))

  @chip.scoped(slots=slots, produced=produced, consumed=consumed, scratch=dict(scratch))
  def _(slots, produced, consumed, scratch):
    group = lax.axis_index("wg")

    def maker(i):
      return lax.rem(i, jnp.int32(makers))

    @pl.when(group == _COPIER)
    def _():
      plgpu.set_max_registers(_COPYING, action="decrease")

      def free(n):
        """The slot of the n-th step, when it has been read."""
        slot = lax.rem(n, jnp.int32(stages))

        @pl.when(n >= stages)
        def _():
          plgpu.barrier_wait(consumed.at[slot])

        return slot

      def copy(i, which, first):
        found = list(zip(*(one.arrays(which) for one in operands), strict=True))
        counts = work.steps(which)

        def step(k, _):
          slot = free(first + k)

          def fetch(arrays, k):
            for one, (ref, origin), to in zip(operands, arrays, slots, strict=True):
              at = pl.ds((origin + k) * one.depth, one.depth)
              plgpu.copy_gmem_to_smem(
                ref.at[:, at] if one.axis else ref.at[at, :],
                to.at[slot],
                produced.at[maker(i), slot],
                collective_axes="cluster" if one.shared else None,
              )

          if len(found) == 1:
            fetch(found[0], k)
            return
          begin: Any = jnp.int32(0)
          for arrays, count in zip(found, counts, strict=True):
            inside = (k >= begin) & (k < begin + count)
            pl.when(inside)(functools.partial(fetch, arrays, k - begin))
            begin += count

        lax.fori_loop(0, work.total(which), step, None)

      # Neither barriers nor memory may go while others still use them.
      total = each(copy)
      lax.fori_loop(0, stages, lambda n, _: chip.nothing(free(total + n)), None)

    @pl.when(group != _COPIER)
    def _():
      plgpu.set_max_registers(_COMPUTING, action="increase")

      def make(i, which, first):
        def over(totals):
          steps = jnp.int32(work.total(which))

          def step(k, _):
            slot = lax.rem(first + k, jnp.int32(stages))
            plgpu.barrier_wait(produced.at[maker(i), slot])
            tiles = [ref.at[slot] for ref in slots]
            work.step(k, group, which, scratch, tiles, totals)
            if tile.in_flight:
              plgpu.wgmma_wait(work.products)
              pl.when(k > 0)(lambda: release(k - 1))
            else:
              plgpu.wgmma_wait(0)
              release(k)

          def release(k):
            slot = lax.rem(first + k, jnp.int32(stages))
            plgpu.barrier_arrive(consumed.at[slot])

          lax.fori_loop(0, steps, step, None)
          if tile.in_flight:
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: release(steps - 1))

        if not tile.alternating:
          work.make(group, which, scratch, over)
          return

        @pl.when(maker(i) == group)
        def _():
          work.make(group, which, scratch, over)

      each(make)

  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
