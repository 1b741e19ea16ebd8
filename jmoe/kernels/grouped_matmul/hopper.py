"""Grouped matmul on Hopper GPUs, with its two gradients; 16-bit types, float32 sums.

The layout is aligned to `hopper.BLOCK` rows.  Blocks without rows are neither read nor
written: what stands there after a call is whatever was in memory.  At their places the
gradients of the matrices read only rows that exist, and padding rows must be zero.

Prefixes of names: `x` rows that go in, `y` rows that come out.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.folding import foldable
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.kernels.row_blocks import expert_of_rows, in_bands, sums, used_blocks
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
    d_bias = sums(dy_RF, groups, BLOCK).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


hopper.defvjp(_forward, _backward)


def rows(
  pairs: Sequence[tuple[Array, Array]],
  groups: Groups,
  *,
  transpose: bool = False,
  num_sms: int | None = None,
  dtype: Any = None,
) -> Array:
  """`sum over pairs of x_r w_e(r)`, or with the matrices transposed; `[R,F]`.

  Args:
    pairs: rows [R,D] and matrices [E,D,F] (transposed: [E,F,D]), all of one shape.
    groups: aligned to `BLOCK`.
    transpose: contract the matrices' last dimension instead of the one before it.
    num_sms: multiprocessors to use; None: all.
    dtype: of the result; None: the operands'.
  """
  cols = pairs[0][1].shape[1 if transpose else 2]
  kernel = functools.partial(
    _rows_kernel, transpose=transpose, num_sms=num_sms, out=dtype or pairs[0][0].dtype
  )
  operands = [x for pair in pairs for x in (padded(pair[0], 1), padded(pair[1], 1, 2))]
  return foldable(kernel)(groups, *operands)[:, :cols]


def matrices(
  x_RD: Array, y_RF: Array, groups: Groups, *, num_sms: int | None = None
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any."""
  D, F = x_RD.shape[1], y_RF.shape[1]
  kernel = functools.partial(_matrices_kernel, num_sms=num_sms)
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
  groups: Groups, *operands: Array, transpose: bool, num_sms: int | None, out: Any
) -> Array:
  """Operands are rows and matrices of each pair in turn."""
  pairs = len(operands) // 2
  R, D = operands[0].shape
  F = operands[1].shape[1 if transpose else 2]
  tile, dtype = rows_tile(F, D, pairs), operands[0].dtype
  cols = pl.cdiv(F, tile.cols)
  rows_own, cols_own = tile.own
  sms = num_sms or chip.multiprocessors()
  blocks = used_blocks(groups, R, BLOCK)
  x_spec = plgpu.BlockSpec(
    (tile.rows, DEPTH), lambda k: (0, k), transforms=chip.swizzled(dtype, DEPTH)
  )
  if transpose:
    w_spec = plgpu.BlockSpec(
      (tile.cols, DEPTH), lambda k: (0, k), transforms=chip.swizzled(dtype, DEPTH)
    )
  else:
    w_spec = plgpu.BlockSpec(
      (DEPTH, tile.cols), lambda k: (k, 0), transforms=chip.swizzled(dtype, 64)
    )

  def body(*refs):
    *operand_refs, expert_ref, block_ref, used_ref, y_ref = refs

    def pipe(multiply, context, state=None):
      return chip.pipeline(
        multiply,
        context,
        steps=pl.cdiv(D, DEPTH),
        specs=[x_spec, w_spec] * pairs,
        stages=tile.stages,
        state=state,
      )

    def matrix(w_ref, e, c):
      if transpose:
        return w_ref.at[e, pl.ds(c, tile.cols), :]
      return w_ref.at[e, :, pl.ds(c, tile.cols)]

    shape = (tile.cols, D) if transpose else (D, tile.cols)
    like = [jax.ShapeDtypeStruct((tile.rows, D), dtype)]
    like += [jax.ShapeDtypeStruct(shape, dtype)]

    @chip.scoped(
      buffers=pipe(chip.nothing, chip.nothing).get_allocations(*like * pairs),
      staged=chip.staging(rows_own, out),
    )
    def _(buffers, staged):
      group = lax.axis_index("wg")
      used = used_ref[0]

      def make(t, state):
        which, column = in_bands(t, used, cols, tile.band)
        row, col = block_ref[which] * BLOCK, column * tile.cols
        own = pl.ds(group * cols_own, cols_own)

        def multiply(_, *both):
          *operands, total = both
          for x, w in zip(operands[::2], operands[1::2], strict=True):
            w = chip.transposed(w.at[own]) if transpose else w.at[:, own]
            plgpu.wgmma(total, x, w)
          plgpu.wgmma_wait(0)
          return total

        def context(run):
          @functools.partial(pl.run_scoped, total=chip.accumulator(rows_own, cols_own))
          def _(total):
            run(total)
            first = col + group * cols_own

            def place(r, rows, c, cols):
              return y_ref.at[pl.ds(row + r, rows), pl.ds(first + c, cols)]

            chip.store(total[...].astype(out), staged, group, place)

        sources = []
        for x_ref, w_ref in zip(operand_refs[::2], operand_refs[1::2], strict=True):
          sources += [x_ref.at[pl.ds(row, tile.rows), :]]
          sources += [matrix(w_ref, expert_ref[which], col)]
        pipe(multiply, context, state)(*sources, allocations=buffers)

      chip.each_tile(used * cols, blocks=sms, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  made = chip.struct((R, F), out, operands)
  name = "grouped_matmul_transposed" if transpose else "grouped_matmul"
  kernel = chip.launch(body, made, blocks=sms, name=name)
  return kernel(*operands, blocks.expert, blocks.block, blocks.used)


def _matrices_kernel(
  groups: Groups, x_RD: Array, y_RF: Array, *, num_sms: int | None
) -> Array:
  R, D = x_RD.shape
  F, E = y_RF.shape[1], groups.start.shape[0]
  tile, dtype = matrices_tile(F), x_RD.dtype
  rows, cols = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.cols)
  rows_own, cols_own = tile.own
  sms = num_sms or chip.multiprocessors()
  # An expert without rows points inside the buffer, and its sum is not used.
  start_E = jnp.minimum(groups.start, R - BLOCK)

  def body(x_ref, y_ref, start_ref, rows_ref, w_ref):
    def pipe(multiply, context, steps, first, row, col):
      def spec(width, place):
        return plgpu.BlockSpec(
          (DEPTH, width),
          lambda k: (first + k, place),
          transforms=chip.swizzled(dtype, 64),
        )

      return chip.pipeline(
        multiply,
        context,
        steps=steps,
        specs=[spec(tile.rows, row), spec(tile.cols, col)],
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

      def make(t, state):
        del state
        e = lax.div(t, jnp.int32(rows * cols))
        within = t - e * (rows * cols)
        band = min(tile.band, rows)
        row, col = in_bands(within, jnp.int32(rows), cols, band)
        first = lax.div(start_ref[e], jnp.int32(DEPTH))
        blocks = lax.div(rows_ref[e] + (BLOCK - 1), jnp.int32(BLOCK))
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

        steps = blocks * (BLOCK // DEPTH)
        pipe(multiply, context, steps, first, row, col)(
          x_ref, y_ref, allocations=buffers
        )

      count = jnp.int32(E * rows * cols)
      chip.each_tile(count, blocks=sms, chained=False, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = chip.struct((E, D, F), dtype, x_RD)
  kernel = chip.launch(body, out, blocks=sms, name="grouped_matmul_matrices")
  return kernel(x_RD, y_RF, start_E, groups.rows)


def _plus_bias(y_RF: Array, bias_EF: Array, groups: Groups) -> Array:
  """Each row plus the bias of its expert; XLA makes one pass of it."""
  expert_R = expert_of_rows(groups, y_RF.shape[0], BLOCK)
  return (y_RF + bias_EF[expert_R].astype(y_RF.dtype)).astype(y_RF.dtype)
