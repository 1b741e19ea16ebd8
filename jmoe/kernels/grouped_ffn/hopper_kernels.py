"""The two kernels of a gated feed-forward on Hopper, each with three results or more.

What the activation needs and gives stays in registers beside the sums of a product.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import DEPTH, Tile
from jmoe.kernels.hopper_rows import row_kernel, scaled, store, values_of_rows
from jmoe.kernels.hopper_tiles import choose
from jmoe.types import Groups

_SLOTS = 2  # pieces of the hidden arrays in shared memory, of each warpgroup
Activation = Callable[[Array], tuple[Array, Array]]  # x -> its value, its derivative


def hidden_kernel(
  groups: Groups,
  x_RD: Array,
  gate_EDF: Array,
  up_EDF: Array,
  weight_R: Array | None = None,
  *,
  activation: Activation,
  num_sms: int | None,
  hidden: bool,
  product: bool,
  tile: Tile | None = None,
) -> tuple[Array, ...]:
  """What is asked for of `x gate, x up` and `weight f(x gate) (x up)`, `[R,F]` each.

  Args:
    hidden: the first two.
    product: the third.
    tile: of each of the two; None: that of the table in `hopper_tiles`.
  """
  (R, D), F = x_RD.shape, gate_EDF.shape[2]
  tile = tile or choose("hidden", width=F, depth=D, operands=3)

  def multiply(place, tiles, totals):
    x, gate, up = tiles
    plgpu.wgmma(totals[0], x.at[place.own], gate)
    plgpu.wgmma(totals[1], x.at[place.own], up)

  def finish(place, sums, scale, scratch, others, results):
    del others
    g, u = sums
    values = (g, u) if hidden else ()
    if product:
      a = activation(g)[0] * u
      values += (scaled(a, scale[0]) if scale else a,)
    for value, ref in zip(values, results, strict=True):
      store(value, scratch["staged"], place, ref)

  return row_kernel(
    groups,
    () if weight_R is None else (weight_R,),
    (x_RD,),
    (gate_EDF, up_EDF),
    tile=tile,
    transpose=False,
    sums=2,
    multiply=multiply,
    begin=_weights,
    finish=finish,
    scratch={"staged": chip.staging(tile.own[0], x_RD.dtype)},
    out=(chip.struct((R, F), x_RD.dtype, x_RD),) * (2 * hidden + product),
    name="gated_hidden",
    num_sms=num_sms,
  )


def back_kernel(
  groups: Groups,
  dy_RD: Array,
  down_EFD: Array,
  g_RF: Array,
  u_RF: Array,
  weight_R: Array | None = None,
  *,
  activation: Activation,
  num_sms: int | None,
  tile: Tile | None = None,
) -> tuple[Array, ...]:
  """Gradients of `x gate` and `x up`, `weight f(x gate) (x up)`, and the weight's.

  The first two are written over the arrays that they are gradients of, which saves two
  of [R,F]; not inside `shard_map`.

  Returns:
    `[R,F]` three times, and f32[R] if there is a weight.
  """
  (R, D), F, dtype = dy_RD.shape, down_EFD.shape[1], dy_RD.dtype
  tile = tile or choose("back", width=F, depth=D)
  steps = pl.cdiv(D, DEPTH)
  # The hidden arrays come in pieces, some while the product is made.
  rows_own, cols_own = tile.own
  pieces = [(r, c) for r in range(0, rows_own, 64) for c in range(0, cols_own, 64)]

  def fetch(p, place, scratch, others):
    held, arrived = scratch["held"], scratch["arrived"]
    (r, c), slot = pieces[p], p % _SLOTS
    for n, ref in enumerate(others[:2]):
      plgpu.copy_gmem_to_smem(
        place.of(ref, r, 64, c, 64),
        held.at[place.group, slot, n],
        arrived.at[place.group, slot],
      )

  def during(step, place, scratch, others):
    # By then what the last tile left in their places has gone out.
    @pl.when(step == min(4, steps - 1))
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for p in range(min(_SLOTS, len(pieces))):
        fetch(p, place, scratch, others)

  def multiply(place, tiles, totals):
    dy, down = tiles
    if not tile.alternating:
      dy = dy.at[place.own]
    plgpu.wgmma(totals[0], dy, chip.transposed(down))

  def finish(place, sums, scale, scratch, others, results):
    held, arrived = scratch["held"], scratch["arrived"]
    dots: dict[int, Array] = {}
    for p, (r, c) in enumerate(pieces):
      slot = p % _SLOTS
      if p and _SLOTS <= p + _SLOTS - 1 < len(pieces):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before this one
        fetch(p + _SLOTS - 1, place, scratch, others)
      plgpu.barrier_wait(arrived.at[place.group, slot])
      g, u = (held[place.group, slot, n].astype(jnp.float32) for n in range(2))
      d = sums[0][r : r + 64, c : c + 64]
      value, slope = activation(g)
      a = value * u
      if scale:
        dots[r] = jnp.sum(d * a, axis=1) + (dots[r] if r in dots else 0.0)
        own = scale[0][r : r + 64] if rows_own > 64 else scale[0]
        d, a = scaled(d, own), scaled(a, own)
      held[place.group, slot, 0] = (d * u * slope).astype(dtype)
      held[place.group, slot, 1] = (d * value).astype(dtype)
      held[place.group, slot, 2] = a.astype(dtype)
      plgpu.commit_smem()

      # A repeated tile read what has been written over: its results are wrong.
      @pl.when(place.real)
      def _(r=r, c=c, slot=slot):
        for n, ref in enumerate(results[:3]):
          plgpu.copy_smem_to_gmem(
            held.at[place.group, slot, n], place.of(ref, r, 64, c, 64)
          )

    @pl.when(place.real)
    def _():
      for ref in results[3:]:
        for r, dot in dots.items():
          ref[place.column, pl.ds(place.row + r, 64)] = dot

  out = (chip.struct((R, F), dtype, dy_RD),) * 3
  weights = () if weight_R is None else (weight_R,)
  if weights:  # a partial sum of each column of tiles
    columns = pl.cdiv(F, tile.cols)
    out += (chip.struct((columns, R), jnp.float32, dy_RD),)
  # What a warpgroup reads of the two hidden arrays, then their gradients in the same
  # places, and the third result: [warpgroup, slot, which, rows, cols].
  held = plgpu.SMEM((2, _SLOTS, 3, 64, 64), dtype, transforms=chip.swizzled(dtype, 64))
  arrived = plgpu.Barrier(num_arrivals=2, num_barriers=(2, _SLOTS))
  *found, last = row_kernel(
    groups,
    (g_RF, u_RF, *weights),
    (dy_RD,),
    (down_EFD,),
    tile=tile,
    transpose=True,
    sums=1,
    multiply=multiply,
    begin=lambda place, others: _weights(place, others[2:]),
    during=during,
    finish=finish,
    scratch={"held": held, "arrived": arrived},
    out=out,
    name="gated_back",
    num_sms=num_sms,
    updated=2,
  )
  return *found, jnp.sum(last, axis=0) if weights else last


def _weights(place, others):
  """They come while the products are made."""
  return [values_of_rows(place, ref) for ref in others]
