"""The two kernels of a feed-forward on Hopper, each with several results.

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
from jmoe.kernels.hopper_rows import (
  multiply,
  over_columns,
  over_rows,
  row_kernel,
  store,
  values_of_columns,
  values_of_rows,
  whole_tiles,
)
from jmoe.kernels.hopper_tiles import choose
from jmoe.kernels.pieces import Columns, Part
from jmoe.types import Groups

Activation = Callable[[Array], tuple[Array, Array]]  # x -> its value, its derivative


def hidden_kernel(
  groups: Groups,
  x_RD: Array,
  *arrays: Array,
  ups: int,
  biased: bool,
  activation: Activation,
  num_sms: int | None,
  hidden: bool,
  product: bool,
  tile: Tile | None = None,
  part: Part | None = None,
  made: int = 0,
) -> tuple[Array, ...]:
  """What is asked for of `h_n = x w_n + b_n` and `weight f(h_0) h_1`, `[R,F]` each.

  Args:
    groups: aligned to `hopper.BLOCK`.
    x_RD: rows.
    arrays: `ups` matrices [E,D,F], then if `biased` as many [E,F], then perhaps f32[R],
      then what the part before gave.
    ups: one or two; with one the product is `weight f(h_0)`.
    biased: whether there are biases.
    activation: f.
    num_sms: multiprocessors to use; None: all.
    hidden: give the first arrays.
    product: give the last one.
    tile: of each of the first arrays; None: that of the table in `hopper_tiles`.
    part: of the buffer, which `groups` and the rows are of; None: all of it.  The
      weights and what is given are of all of it.
    made: how many arrays the part before gave; they are written over.
  """
  (R, D), F = x_RD.shape, arrays[0].shape[2]
  R = R // part.size * part.total if part else R
  arrays, earlier = arrays[: len(arrays) - made], arrays[len(arrays) - made :]
  kernel = "hidden" if ups == 2 else "rows"
  tile = tile or choose(kernel, width=F, depth=D, operands=1 + ups)

  biases = [whole_tiles(a, tile) for a in arrays[ups : ups + ups * biased]]
  others = (*earlier, *biases, *arrays[ups + ups * biased :])

  def products(place, tiles, totals):
    for total, w in zip(totals, tiles[1:], strict=True):
      multiply(tile, place, total, tiles[0], w)

  def begin(place, others):
    others = others[made:]
    biases, weights = others[: ups * biased], others[ups * biased :]
    return (
      [values_of_columns(place, ref) for ref in biases],
      [values_of_rows(place, ref) for ref in weights],
    )

  def finish(place, sums, begun, scratch, others, results):
    del others
    biases, weights = begun
    for n, bias in enumerate(biases):
      sums[n] += over_columns(bias, sums[n])
    values = sums if hidden else []
    if product:
      values = [*values, _product(activation(sums[0])[0], sums[1:], weights)]
    for value, ref in zip(values, results, strict=True):
      store(value, scratch["staged"], place, ref)

  return row_kernel(
    groups,
    others,
    (x_RD,),
    arrays[:ups],
    tile=tile,
    transpose=False,
    sums=ups,
    products=products,
    begin=begin,
    finish=finish,
    scratch={"staged": chip.staging(tile.own[0], x_RD.dtype)},
    out=(chip.struct((R, F), x_RD.dtype, x_RD),) * (ups * hidden + product),
    name="ffn_hidden",
    num_sms=num_sms,
    updated=made,
    part=part,
  )


def _product(value, others, weights) -> Array:
  """The activation times the other hidden array and the weight, if there are any."""
  for other in others:
    value = value * other
  return value * over_rows(weights[0], value) if weights else value


def back_kernel(
  groups: Groups,
  dy_RD: Array,
  down_EFD: Array,
  *arrays: Array,
  ups: int,
  activation: Activation,
  num_sms: int | None,
  tile: Tile | None = None,
  columns: Columns | None = None,
) -> tuple[Array, ...]:
  """Gradients of the hidden arrays, what went into `down`, and the weight's gradient.

  The first ones are written over the arrays that they are gradients of, which saves as
  many of [R,F].

  Args:
    groups: aligned to `hopper.BLOCK`.
    dy_RD: gradient of the rows that come out.
    down_EFD: the matrix that made them.
    arrays: the hidden arrays [R,F], and perhaps the weight f32[R].
    ups: how many hidden arrays.
    activation: of the first of them.
    num_sms: multiprocessors to use; None: all.
    tile: None: that of the table in `hopper_tiles`.
    columns: of the hidden arrays, which alone are written over, and of what went into
      `down`; None: all.

  Returns:
    `[R,F]` `ups` times, `[R,F]` or these columns of it, and if there is a weight
    f32[R], their part of its gradient.
  """
  (R, D), F, dtype = dy_RD.shape, down_EFD.shape[1], dy_RD.dtype
  columns = columns or Columns(0, F, F)
  tile = tile or choose("back", width=columns.size, depth=D)
  # What a tile past the last column writes, the next piece would read.
  assert columns.first + columns.size == F or columns.size % tile.cols == 0, columns
  assert tile.alternating or not tile.by_cols, tile  # who makes a row sums it alone
  steps = pl.cdiv(D, DEPTH)
  # The hidden arrays come in pieces, some while the product is made.
  rows_own, cols_own = tile.own
  # Pieces in shared memory, of each warpgroup; wider operands leave room for one.
  slots = 2 if tile.cols <= 128 else 1
  pieces = [(r, c) for r in range(0, rows_own, 64) for c in range(0, cols_own, 64)]

  def fetch(p, place, scratch, others):
    held, arrived = scratch["held"], scratch["arrived"]
    (r, c), slot = pieces[p], p % slots
    for n, ref in enumerate(others[:ups]):
      plgpu.copy_gmem_to_smem(
        place.of(ref, r, 64, columns.first + c, 64),
        held.at[place.group, slot, n],
        arrived.at[place.group, slot],
      )

  def during(step, place, scratch, others):
    # By then what the last tile left in their places has gone out.
    @pl.when(step == min(4, steps - 1))
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for p in range(min(slots, len(pieces))):
        fetch(p, place, scratch, others)

  def products(place, tiles, totals):
    multiply(tile, place, totals[0], *tiles, transpose=True)

  def finish(place, sums, scale, scratch, others, results):
    held, arrived = scratch["held"], scratch["arrived"]
    dots: dict[int, Array] = {}
    for p, (r, c) in enumerate(pieces):
      slot = p % slots
      if p and slots <= p + slots - 1 < len(pieces):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before this one
        fetch(p + slots - 1, place, scratch, others)
      plgpu.barrier_wait(arrived.at[place.group, slot])
      mine = [held.at[place.group, slot, n] for n in range(ups + 1)]
      h, *other = (ref[...].astype(jnp.float32) for ref in mine[:ups])
      d = sums[0][r : r + 64, c : c + 64]
      value, slope = activation(h)
      a = _product(value, other, ())
      if scale:
        dots[r] = jnp.sum(d * a, axis=1) + (dots[r] if r in dots else 0.0)
        own = scale[0][r : r + 64] if rows_own > 64 else scale[0]
        d, a = d * over_rows(own, d), a * over_rows(own, a)
      mine[0][...] = _product(d * slope, other, ()).astype(dtype)
      if other:
        mine[1][...] = (d * value).astype(dtype)
      mine[-1][...] = a.astype(dtype)
      plgpu.commit_smem()

      firsts = (*[columns.first] * ups, 0)
      for ref, result, first in zip(mine, results, firsts, strict=False):
        plgpu.copy_smem_to_gmem(ref, place.of(result, r, 64, first + c, 64))
    for ref in results[ups + 1 :]:
      for r, dot in dots.items():
        ref[place.column, pl.ds(place.row + r, 64)] = dot

  widths = (*[F] * ups, columns.size)
  out = tuple(chip.struct((R, width), dtype, dy_RD) for width in widths)
  weighed = len(arrays) > ups
  if weighed:  # a partial sum of each column of tiles
    tiles = pl.cdiv(columns.size, tile.cols)
    out += (chip.struct((tiles, R), jnp.float32, dy_RD),)
  # What a warpgroup reads of the hidden arrays, then their gradients in the same
  # places, and what went into `down`: [warpgroup, slot, which, rows, cols].
  held = plgpu.SMEM(
    (2, slots, ups + 1, 64, 64), dtype, transforms=chip.swizzled(dtype, 64)
  )
  arrived = plgpu.Barrier(num_arrivals=ups, num_barriers=(2, slots))
  *found, last = row_kernel(
    groups,
    arrays,
    (dy_RD,),
    (down_EFD,),
    tile=tile,
    transpose=True,
    sums=1,
    products=products,
    begin=lambda place, others: [values_of_rows(place, ref) for ref in others[ups:]],
    during=during,
    finish=finish,
    scratch={"held": held, "arrived": arrived},
    out=out,
    name="ffn_back",
    num_sms=num_sms,
    updated=ups,
    columns=columns,
  )
  return *found, jnp.sum(last, axis=0) if weighed else last
