"""Grouped matmul on Hopper GPUs, with its two gradients; 16-bit types, float32 sums.

The layout is aligned to `hopper.BLOCK` rows.  Blocks without rows are neither read nor
written: what stands there after a call is whatever was in memory.  At their places the
gradients of the matrices read only rows that exist, and padding rows must be zero.

Prefixes of names: `x` rows that go in, `y` rows that come out.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.kernels.hopper_rows import row_kernel, store
from jmoe.types import Groups

_ALIGNED = 64  # tiles in shared memory are 128 bytes wide, and so is what they are of


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def hopper(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  num_sms: int | None = None,
  dtype: Any = None,
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; undefined in blocks without rows.

  Args:
    x_RD: rows grouped by expert, in bfloat16 or float16; padding rows zero.
    w_EDF: a matrix per expert, of the same dtype.
    groups: aligned to `BLOCK`.
    bias_EF: a bias per expert, or None.
    num_sms: multiprocessors to use; None: all.
    dtype: of the result, the operands' or float32; None: the operands'.
  """
  pairs = ((x_RD, w_EDF),)
  if bias_EF is None:
    return rows(pairs, groups, num_sms=num_sms, dtype=dtype)
  y_RF = rows(pairs, groups, num_sms=num_sms, dtype=jnp.float32)  # rounded once
  return _plus_bias(y_RF, bias_EF, groups).astype(dtype or x_RD.dtype)


def _forward(x_RD, w_EDF, groups, bias_EF, num_sms, dtype):
  y_RF = hopper(x_RD, w_EDF, groups, bias_EF, num_sms, dtype)
  return y_RF, (x_RD, w_EDF, groups, bias_EF)


def _backward(num_sms, dtype, residual, dy_RF):
  del dtype
  x_RD, w_EDF, groups, bias_EF = residual
  dy_RF = dy_RF.astype(x_RD.dtype)  # what the tensor cores take
  dx_RD = rows(((dy_RF, w_EDF),), groups, transpose=True, num_sms=num_sms)
  dw_EDF = matrices(x_RD, dy_RF, groups, num_sms=num_sms)
  d_bias = None
  if bias_EF is not None:
    d_bias = _sums(dy_RF, groups).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


hopper.defvjp(_forward, _backward)


def rows(
  pairs: Sequence[tuple[Array, Array]],
  groups: Groups,
  *,
  transpose: bool = False,
  num_sms: int | None = None,
  dtype: Any = None,
  tile: Tile | None = None,
) -> Array:
  """`sum over pairs of x_r w_e(r)`, or with the matrices transposed; `[R,F]`.

  Args:
    pairs: rows [R,D] and matrices [E,D,F] (transposed: [E,F,D]), all of one shape.
    groups: aligned to `BLOCK`.
    transpose: contract the matrices' last dimension instead of the one before it.
    num_sms: multiprocessors to use; None: all.
    dtype: of the result; None: the operands'.
    tile: None: `rows_tile`.
  """
  cols = pairs[0][1].shape[1 if transpose else 2]
  kernel = functools.partial(
    _rows_kernel,
    transpose=transpose,
    num_sms=num_sms,
    out=dtype or pairs[0][0].dtype,
    tile=tile,
  )
  operands = [x for pair in pairs for x in (padded(pair[0], 1), padded(pair[1], 1, 2))]
  return foldable(kernel)(groups, *operands)[:, :cols]


def matrices(
  x_RD: Array,
  y_RF: Array,
  groups: Groups,
  *,
  num_sms: int | None = None,
  tile: Tile | None = None,
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any."""
  D, F = x_RD.shape[1], y_RF.shape[1]
  kernel = functools.partial(_matrices_kernel, num_sms=num_sms, tile=tile)
  return foldable(kernel)(groups, padded(x_RD, 1), padded(y_RF, 1))[:, :D, :F]


def rows_tile(cols: int, depth: int, pairs: int) -> Tile:
  """The tile for rows times matrices.

  Args:
    cols: of the output.
    depth: contracted, of each pair.
    pairs: that are summed.
  """
  steps = pl.cdiv(depth, DEPTH)
  most = (4, 3, 2) if pairs == 1 else (2,)  # what shared memory holds
  stages = next((n for n in most if steps % n == 0), 2)
  # A chain goes on with the slot after the last one, so a tile must end with the last.
  chained = steps % stages == 0
  width = 256 if cols >= 256 else 128
  return Tile(BLOCK, width, by_cols=True, stages=stages, chained=chained)


def matrices_tile(cols: int) -> Tile:
  """The tile for a matrix's gradient, whose depth is the rows of an expert."""
  return Tile(128, 256 if cols >= 256 else 128, by_cols=False, chained=False)


def padded(x: Array, *axes: int) -> Array:
  """With zeros up to sizes that a tile in shared memory can be cut from."""
  sizes = [max(x.shape[n], 128) for n in axes]
  widths = [(0, 0)] * x.ndim
  for n, size in zip(axes, sizes, strict=True):
    widths[n] = (0, -(-size // _ALIGNED) * _ALIGNED - x.shape[n])
  return x if not any(after for _, after in widths) else jnp.pad(x, widths)


def _rows_kernel(
  groups: Groups,
  *operands: Array,
  transpose: bool,
  num_sms: int | None,
  out: Any,
  tile: Tile | None,
) -> Array:
  """Operands are rows and matrices of each pair in turn."""
  lefts, rights = operands[::2], operands[1::2]
  (R, D), F = lefts[0].shape, rights[0].shape[1 if transpose else 2]
  tile = tile or rows_tile(F, D, len(lefts))

  def multiply(place, tiles, totals):
    for x, w in zip(tiles[: len(lefts)], tiles[len(lefts) :], strict=True):
      w = chip.transposed(w.at[place.own]) if transpose else w.at[:, place.own]
      plgpu.wgmma(totals[0], x, w)

  def finish(place, sums, begun, scratch, others, results):
    del begun, others
    store(sums[0], scratch["staged"], place, results[0])

  (made,) = row_kernel(
    groups,
    (),
    lefts,
    rights,
    tile=tile,
    transpose=transpose,
    sums=1,
    multiply=multiply,
    finish=finish,
    scratch={"staged": chip.staging(tile.own[0], out)},
    out=(chip.struct((R, F), out, operands),),
    name="grouped_matmul_transposed" if transpose else "grouped_matmul",
    num_sms=num_sms,
  )
  return made


def _matrices_kernel(
  groups: Groups,
  x_RD: Array,
  y_RF: Array,
  *,
  num_sms: int | None,
  tile: Tile | None,
) -> Array:
  R, D = x_RD.shape
  F, E = y_RF.shape[1], groups.start.shape[0]
  tile, dtype = tile or matrices_tile(F), x_RD.dtype
  rows, cols = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.cols)
  # Thread blocks of a cluster make rows one below the other of the same columns.
  tile = tile.that_fits(rows)
  tall = rows // tile.cluster
  rows_own, cols_own = tile.own
  blocks = max(1, (num_sms or chip.multiprocessors()) // tile.cluster)
  # An expert without rows points inside the buffer, and its sum is not used.
  start_E = jnp.minimum(groups.start, R - BLOCK)

  def body(x_ref, y_ref, start_ref, rows_ref, w_ref):
    def pipe(multiply, context, steps, first, row, col):
      def spec(width, place, **shared):
        return plgpu.BlockSpec(
          (DEPTH, width),
          lambda k: (first + k, place),
          transforms=chip.swizzled(dtype, 64),
          **shared,
        )

      return chip.pipeline(
        multiply,
        context,
        steps=steps,
        specs=[spec(tile.rows, row), spec(tile.cols, col, **tile.shared)],
        stages=tile.stages,
      )

    @chip.scoped(
      buffers=pipe(chip.nothing, chip.nothing, 64, 0, 0, 0).get_allocations(
        x_ref, y_ref
      ),
      staged=chip.staging(rows_own, dtype),
    )
    def _(buffers, staged):
      group = lax.axis_index("wg")

      def make(t, state, real):
        del state, real
        e = lax.div(t, jnp.int32(tall * cols))
        within = t - e * (tall * cols)
        band = min(tile.band, tall)
        row, col = chip.in_bands(within, jnp.int32(tall), cols, band)
        row = row * tile.cluster + tile.member()
        first = lax.div(start_ref[e], jnp.int32(DEPTH))
        depth = lax.div(rows_ref[e] + (BLOCK - 1), jnp.int32(BLOCK))
        own = pl.ds(group * rows_own, rows_own)

        def multiply(_, x, y, total):
          plgpu.wgmma(total, chip.transposed(x.at[:, own]), y)
          plgpu.wgmma_wait(0)
          return total

        def context(run):
          @functools.partial(pl.run_scoped, total=chip.accumulator(rows_own, cols_own))
          def _(total):
            run(total)
            top, left = row * tile.rows + group * rows_own, col * tile.cols

            def place(r, rows, c, cols):
              return w_ref.at[e, pl.ds(top + r, rows), pl.ds(left + c, cols)]

            chip.store(total[...].astype(dtype), staged, group, place)

        steps = depth * (BLOCK // DEPTH)
        pipe(multiply, context, steps, first, row, col)(
          x_ref, y_ref, allocations=buffers
        )

      count = jnp.int32(E * tall * cols)
      chip.each_tile(count, blocks=blocks, chained=False, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = chip.struct((E, D, F), dtype, x_RD)
  kernel = chip.launch(
    body, out, blocks=blocks, cluster=tile.cluster, name="grouped_matmul_matrices"
  )
  return kernel(x_RD, y_RF, start_E, groups.rows)


def _plus_bias(y_RF: Array, bias_EF: Array, groups: Groups) -> Array:
  """Each row plus the bias of its expert; XLA makes one pass of it."""
  expert_R = _expert_of_rows(groups, y_RF.shape[0])
  return (y_RF + bias_EF[expert_R].astype(y_RF.dtype)).astype(y_RF.dtype)


def _expert_of_rows(groups: Groups, num_rows: int) -> Array:
  """i32[R] of every row that exists; anything in range for the others."""
  block_B = jnp.arange(num_rows // BLOCK, dtype=jnp.int32) * BLOCK
  end_E = groups.start + -(-groups.rows // BLOCK) * BLOCK
  inside_BE = (block_B[:, None] >= groups.start) & (block_B[:, None] < end_E)
  return jnp.repeat(jnp.argmax(inside_BE, axis=1).astype(jnp.int32), BLOCK)


def _sums(y_RF: Array, groups: Groups) -> Array:
  """f32[E,F] sums of each expert's rows, by blocks; nothing else is read."""
  R, F = y_RF.shape
  place_R = jnp.arange(R, dtype=jnp.int32)
  expert_R = _expert_of_rows(groups, R)
  real_R = (place_R >= groups.start[expert_R]) & (
    place_R < groups.start[expert_R] + groups.rows[expert_R]
  )
  y_RF = jnp.where(real_R[:, None], y_RF, 0).astype(jnp.float32)
  sum_BF = jnp.sum(y_RF.reshape(-1, BLOCK, F), axis=1)
  E = groups.start.shape[0]
  own_EB = jnp.arange(E, dtype=jnp.int32)[:, None] == expert_R[::BLOCK]
  return jnp.matmul(
    own_EB.astype(jnp.float32), sum_BF, precision=jax.lax.Precision.HIGHEST
  )


def foldable(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """A kernel for which models that share a program are more experts of one.

  Args:
    kernel: (groups, arrays [R,...] or [E,...] each) -> a tree of such arrays.
  """

  @custom_vmap
  def call(groups, *arrays):
    return kernel(groups, *arrays)

  @call.def_vmap
  def _(size, batched, groups, *arrays):
    def whole(x, is_batched):
      return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    groups, *arrays = jax.tree.map(whole, (groups, *arrays), tuple(batched))
    # Rows are in the first array of every kernel.
    first = jnp.arange(size, dtype=jnp.int32)[:, None] * arrays[0].shape[1]
    folded = Groups(
      (groups.start + first).reshape(-1), groups.rows.reshape(-1), groups.block
    )
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    out = foldable(kernel)(folded, *flat)
    apart = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return apart, jax.tree.map(lambda _: True, out)

  return call
