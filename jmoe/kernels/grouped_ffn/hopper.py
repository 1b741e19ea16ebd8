"""A gated feed-forward on Hopper: the activation and its derivative beside the sums.

  forward    h_g, h_u = x gate, x up;  a = f(h_g) h_u         one kernel, three results
             y = a down
  backward   da = dy down^T;  dh_g, dh_u, and a again         one kernel, three results
             dx = dh_g gate^T + dh_u up^T                     one kernel, one sum
             the three matrices' gradients

So `a`, `da` and a second `dx` never make a way to memory and back of their own.  Saved
for the backward pass are x, h_g and h_u.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.keeping import named
from jmoe.kernels import hopper as chip
from jmoe.kernels.grouped_matmul.hopper import foldable, matrices, padded, rows
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.types import Groups

Activation = Callable[[Array], tuple[Array, Array]]  # x -> its value, its derivative
_COLS = 128  # of a tile of each of the two hidden arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def gated_ffn(
  activation: Activation,
  x_RD: Array,
  gate_EDF: Array,
  up_EDF: Array,
  down_EFD: Array,
  groups: Groups,
  num_sms: int | None = None,
) -> Array:
  """`(f(x gate) (x up)) down`; undefined in blocks without rows.

  Args:
    activation: of `activations`.
    x_RD: rows grouped by expert, in bfloat16 or float16; padding rows zero.
    gate_EDF, up_EDF, down_EFD: matrices of the same dtype.
    groups: aligned to `BLOCK`.
    num_sms: multiprocessors to use; None: all.
  """
  return _forward(activation, x_RD, gate_EDF, up_EDF, down_EFD, groups, num_sms)[0]


def forward(
  activation: Activation,
  x_RD: Array,
  gate_EDF: Array,
  up_EDF: Array,
  down_EFD: Array,
  groups: Groups,
  num_sms: int | None = None,
) -> tuple[Array, Array, Array]:
  """(the output, x gate, x up)."""
  F = gate_EDF.shape[2]
  kernel = functools.partial(_hidden_kernel, activation=activation, num_sms=num_sms)
  operands = padded(x_RD, 1), padded(gate_EDF, 1, 2), padded(up_EDF, 1, 2)
  hidden = foldable(kernel)(groups, *operands)
  g_RF, u_RF, a_RF = (h[:, :F] for h in hidden)
  y_RD = rows(((a_RF, down_EFD),), groups, num_sms=num_sms)
  return y_RD, g_RF, u_RF


def backward(
  activation: Activation,
  x_RD: Array,
  g_RF: Array,
  u_RF: Array,
  gate_EDF: Array,
  up_EDF: Array,
  down_EFD: Array,
  groups: Groups,
  dy_RD: Array,
  num_sms: int | None = None,
) -> tuple[Array, tuple[Array, Array, Array], Array]:
  """Gradients: of x, (of the three matrices), of x up."""
  F = gate_EDF.shape[2]
  kernel = functools.partial(_back_kernel, activation=activation, num_sms=num_sms)
  operands = padded(dy_RD, 1), padded(down_EFD, 1, 2), padded(g_RF, 1), padded(u_RF, 1)
  found = foldable(kernel)(groups, *operands)
  dg_RF, du_RF, a_RF = (h[:, :F] for h in found)
  pairs = ((dg_RF, gate_EDF), (du_RF, up_EDF))
  dx_RD = rows(pairs, groups, transpose=True, num_sms=num_sms)
  of = functools.partial(matrices, groups=groups, num_sms=num_sms)
  return dx_RD, (of(x_RD, dg_RF), of(x_RD, du_RF), of(a_RF, dy_RD)), du_RF


def _forward(activation, x_RD, gate_EDF, up_EDF, down_EFD, groups, num_sms):
  matrices = gate_EDF, up_EDF, down_EFD
  y_RD, *hidden = forward(activation, x_RD, *matrices, groups, num_sms)
  return y_RD, (x_RD, *named(hidden, "hidden"), *matrices, groups)


def _backward(activation, num_sms, residual, dy_RD):
  x_RD, g_RF, u_RF, *matrices, groups = residual
  gate_EDF, up_EDF, down_EFD = matrices
  hidden = g_RF, u_RF, gate_EDF, up_EDF, down_EFD
  dx_RD, grads, _ = backward(activation, x_RD, *hidden, groups, dy_RD, num_sms)
  return dx_RD, *grads, None


gated_ffn.defvjp(_forward, _backward)


def _stages(steps: int) -> tuple[int, bool]:
  """Steps in shared memory, and whether tiles can be chained."""
  stages = next((n for n in (4, 2) if steps % n == 0), 2)
  return stages, steps % stages == 0


def _hidden_kernel(
  groups: Groups,
  x_RD: Array,
  gate_EDF: Array,
  up_EDF: Array,
  *,
  activation: Activation,
  num_sms: int | None,
) -> tuple[Array, Array, Array]:
  """(x gate, x up, f(x gate) (x up)), `[R,F]` each."""
  (R, D), F, dtype = x_RD.shape, gate_EDF.shape[2], x_RD.dtype
  steps = pl.cdiv(D, DEPTH)
  stages, chained = _stages(steps)
  tile = Tile(BLOCK, _COLS, by_cols=False, stages=stages, chained=chained)
  cols = pl.cdiv(F, tile.cols)
  rows_own, cols_own = tile.own
  sms = num_sms or chip.multiprocessors()
  blocks = chip.used_blocks(groups, R)
  x_spec = plgpu.BlockSpec(
    (tile.rows, DEPTH), lambda k: (0, k), transforms=chip.swizzled(dtype, DEPTH)
  )
  w_spec = plgpu.BlockSpec(
    (DEPTH, tile.cols), lambda k: (k, 0), transforms=chip.swizzled(dtype, 64)
  )

  def body(x_ref, gate_ref, up_ref, expert_ref, block_ref, used_ref, *out_refs):
    def pipe(multiply, context, state=None):
      return chip.pipeline(
        multiply,
        context,
        steps=steps,
        specs=[x_spec, w_spec, w_spec],
        stages=tile.stages,
        state=state,
      )

    x_like = jax.ShapeDtypeStruct((tile.rows, D), dtype)
    w_like = jax.ShapeDtypeStruct((D, tile.cols), dtype)

    @chip.scoped(
      buffers=pipe(chip.nothing, chip.nothing).get_allocations(x_like, w_like, w_like),
      staged=chip.staging(rows_own, dtype),
    )
    def _(buffers, staged):
      group = lax.axis_index("wg")
      used = used_ref[0]

      def make(t, state):
        which, column = chip.in_bands(t, used, cols, tile.band)
        row, col = block_ref[which] * BLOCK, column * tile.cols
        own = pl.ds(group * rows_own, rows_own)

        def multiply(_, x, gate, up, sums):
          plgpu.wgmma(sums[0], x.at[own], gate)
          plgpu.wgmma(sums[1], x.at[own], up)
          plgpu.wgmma_wait(0)
          return sums

        def context(run):
          @functools.partial(
            pl.run_scoped,
            gate_sum=chip.accumulator(rows_own, cols_own),
            up_sum=chip.accumulator(rows_own, cols_own),
          )
          def _(gate_sum, up_sum):
            run((gate_sum, up_sum))
            g, u = gate_sum[...], up_sum[...]
            values = (g, u, activation(g)[0] * u)
            _store_all(values, out_refs, staged, group, row + group * rows_own, col)

        e = expert_ref[which]
        pipe(multiply, context, state)(
          x_ref.at[pl.ds(row, tile.rows), :],
          gate_ref.at[e, :, pl.ds(col, tile.cols)],
          up_ref.at[e, :, pl.ds(col, tile.cols)],
          allocations=buffers,
        )

      chip.each_tile(used * cols, blocks=sms, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = (chip.struct((R, F), dtype, x_RD),) * 3
  kernel = chip.launch(body, out, blocks=sms, name="gated_hidden")
  return kernel(x_RD, gate_EDF, up_EDF, blocks.expert, blocks.block, blocks.used)


def _back_kernel(
  groups: Groups,
  dy_RD: Array,
  down_EFD: Array,
  g_RF: Array,
  u_RF: Array,
  *,
  activation: Activation,
  num_sms: int | None,
) -> tuple[Array, Array, Array]:
  """(gradient of x gate, of x up, f(x gate) (x up)), `[R,F]` each."""
  (R, D), F, dtype = dy_RD.shape, down_EFD.shape[1], dy_RD.dtype
  steps = pl.cdiv(D, DEPTH)
  stages, chained = _stages(steps)
  tile = Tile(BLOCK, _COLS, by_cols=False, stages=stages, chained=chained)
  cols = pl.cdiv(F, tile.cols)
  rows_own, cols_own = tile.own
  sms = num_sms or chip.multiprocessors()
  blocks = chip.used_blocks(groups, R)
  spec = plgpu.BlockSpec(
    (tile.rows, DEPTH), lambda k: (0, k), transforms=chip.swizzled(dtype, DEPTH)
  )

  def body(dy_ref, down_ref, g_ref, u_ref, expert_ref, block_ref, used_ref, *out_refs):
    def pipe(multiply, context, state=None):
      return chip.pipeline(
        multiply,
        context,
        steps=steps,
        specs=[spec, spec],
        stages=tile.stages,
        state=state,
      )

    like = jax.ShapeDtypeStruct((tile.rows, D), dtype)

    @chip.scoped(
      buffers=pipe(chip.nothing, chip.nothing).get_allocations(like, like),
      # What a warpgroup reads of the two hidden arrays, then their gradients in the
      # same places, and the third result: [warpgroup, which, rows, cols].
      held=plgpu.SMEM(
        (2, 3, rows_own, cols_own), dtype, transforms=chip.swizzled(dtype, 64)
      ),
      arrived=plgpu.Barrier(num_barriers=(2, 2)),
    )
    def _(buffers, held, arrived):
      group = lax.axis_index("wg")
      used = used_ref[0]

      def make(t, state):
        which, column = chip.in_bands(t, used, cols, tile.band)
        row, col = block_ref[which] * BLOCK, column * tile.cols
        own = pl.ds(group * rows_own, rows_own)
        first = row + group * rows_own

        def places(ref):
          return ref.at[pl.ds(first, rows_own), pl.ds(col, cols_own)]

        def multiply(indices, dy, down, total):
          # They come while the product is made; by then what the last tile left in
          # their places has gone out.
          @pl.when(indices[0] == min(4, steps - 1))
          def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n, ref in enumerate((g_ref, u_ref)):
              plgpu.copy_gmem_to_smem(
                places(ref), held.at[group, n], arrived.at[group, n]
              )

          plgpu.wgmma(total, dy.at[own], chip.transposed(down))
          plgpu.wgmma_wait(0)
          return total

        def context(run):
          @functools.partial(pl.run_scoped, total=chip.accumulator(rows_own, cols_own))
          def _(total):
            run(total)
            plgpu.barrier_wait(arrived.at[group, 0])
            plgpu.barrier_wait(arrived.at[group, 1])
            da = total[...]
            for c in range(0, cols_own, 64):  # few registers at a time
              piece = pl.ds(c, 64)
              g = held[group, 0, :, piece].astype(jnp.float32)
              u = held[group, 1, :, piece].astype(jnp.float32)
              d = da[:, c : c + 64]
              value, slope = activation(g)
              held[group, 0, :, piece] = (d * u * slope).astype(dtype)
              held[group, 1, :, piece] = (d * value).astype(dtype)
              held[group, 2, :, piece] = (value * u).astype(dtype)
            plgpu.commit_smem()
            for n, ref in enumerate(out_refs):
              plgpu.copy_smem_to_gmem(held.at[group, n], places(ref))

        pipe(multiply, context, state)(
          dy_ref.at[pl.ds(row, tile.rows), :],
          down_ref.at[expert_ref[which], pl.ds(col, tile.cols), :],
          allocations=buffers,
        )

      chip.each_tile(used * cols, blocks=sms, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = (chip.struct((R, F), dtype, dy_RD),) * 3
  kernel = chip.launch(body, out, blocks=sms, name="gated_back")
  operands = (dy_RD, down_EFD, g_RF, u_RF)
  return kernel(*operands, blocks.expert, blocks.block, blocks.used)


def _store_all(values, out_refs, staged, group, row, col) -> None:
  """Each value of a warpgroup to its own array, at the same place."""
  for value, out_ref in zip(values, out_refs, strict=True):

    def place(r, rows, c, cols, out_ref=out_ref):
      return out_ref.at[pl.ds(row + r, rows), pl.ds(col + c, cols)]

    chip.store(value.astype(staged.dtype), staged, group, place)
