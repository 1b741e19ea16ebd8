"""The two kernels of a gated feed-forward on Hopper, each with three results or more.

What the activation needs and gives stays in registers beside the sums of a product.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.kernels import hopper as chip
from jmoe.kernels.hopper import BLOCK, DEPTH, Tile
from jmoe.types import Groups

Activation = Callable[[Array], tuple[Array, Array]]  # x -> its value, its derivative
_COLS = 128  # of a tile of each of the two hidden arrays


def _stages(steps: int) -> tuple[int, bool]:
  """Steps in shared memory, and whether tiles can be chained."""
  stages = next((n for n in (4, 2) if steps % n == 0), 2)
  return stages, steps % stages == 0


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
) -> tuple[Array, ...]:
  """What is asked for of `x gate, x up` and `weight f(x gate) (x up)`, `[R,F]` each.

  Args:
    hidden: the first two.
    product: the third.
  """
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

  weights = () if weight_R is None else (weight_R,)

  def body(x_ref, gate_ref, up_ref, *refs):
    weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
    expert_ref, block_ref, used_ref, *out_refs = refs

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

      def make(t, state, real):
        del real  # an equal result is stored twice
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
            first = row + group * rows_own
            # They come while the products are made.
            scale = [chip.values_of_rows(ref, first, rows_own) for ref in weight_refs]
            run((gate_sum, up_sum))
            g, u = gate_sum[...], up_sum[...]
            values = (g, u) if hidden else ()
            if product:
              a = activation(g)[0] * u
              values += (chip.scaled(a, scale[0]) if scale else a,)
            _store_all(values, out_refs, staged, group, first, col)

        e = expert_ref[which]
        pipe(multiply, context, state)(
          x_ref.at[pl.ds(row, tile.rows), :],
          gate_ref.at[e, :, pl.ds(col, tile.cols)],
          up_ref.at[e, :, pl.ds(col, tile.cols)],
          allocations=buffers,
        )

      chip.each_tile(used * cols, blocks=sms, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = (chip.struct((R, F), dtype, x_RD),) * (2 * hidden + product)
  kernel = chip.launch(body, out, blocks=sms, name="gated_hidden")
  operands = (x_RD, gate_EDF, up_EDF, *weights)
  return kernel(*operands, blocks.expert, blocks.block, blocks.used)


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
) -> tuple[Array, ...]:
  """Gradients of `x gate` and `x up`, `weight f(x gate) (x up)`, and the weight's.

  The first two are written over the arrays that they are gradients of, which saves two
  of [R,F]; not inside `shard_map`.

  Returns:
    `[R,F]` three times, and f32[R] if there is a weight.
  """
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

  weights = () if weight_R is None else (weight_R,)

  def body(g_ref, u_ref, dy_ref, down_ref, *refs):
    weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
    expert_ref, block_ref, used_ref, dg_ref, du_ref, a_ref, *dot_refs = refs

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

      def make(t, state, real):
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
            scale = [chip.values_of_rows(ref, first, rows_own) for ref in weight_refs]
            run(total)
            plgpu.barrier_wait(arrived.at[group, 0])
            plgpu.barrier_wait(arrived.at[group, 1])
            da, dots = total[...], []
            for c in range(0, cols_own, 64):  # few registers at a time
              piece = pl.ds(c, 64)
              g = held[group, 0, :, piece].astype(jnp.float32)
              u = held[group, 1, :, piece].astype(jnp.float32)
              d = da[:, c : c + 64]
              value, slope = activation(g)
              a = value * u
              if scale:
                dots.append(jnp.sum(d * a, axis=1))
                d, a = chip.scaled(d, scale[0]), chip.scaled(a, scale[0])
              held[group, 0, :, piece] = (d * u * slope).astype(dtype)
              held[group, 1, :, piece] = (d * value).astype(dtype)
              held[group, 2, :, piece] = a.astype(dtype)
            plgpu.commit_smem()

            # A repeated tile read what has been written over: its results are wrong.
            @pl.when(real)
            def _():
              for n, ref in enumerate((dg_ref, du_ref, a_ref)):
                plgpu.copy_smem_to_gmem(held.at[group, n], places(ref))
              for ref in dot_refs:
                ref[column, pl.ds(first, rows_own)] = functools.reduce(jnp.add, dots)

        pipe(multiply, context, state)(
          dy_ref.at[pl.ds(row, tile.rows), :],
          down_ref.at[expert_ref[which], pl.ds(col, tile.cols), :],
          allocations=buffers,
        )

      chip.each_tile(used * cols, blocks=sms, chained=tile.chained, body=make)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  out = [chip.struct((R, F), dtype, dy_RD)] * 3
  if weights:  # a partial sum of each column tile
    out.append(chip.struct((cols, R), jnp.float32, dy_RD))
  kernel = chip.launch(body, tuple(out), blocks=sms, name="gated_back", updated=2)
  operands = (g_RF, u_RF, dy_RD, down_EFD, *weights)
  dg_RF, du_RF, a_RF, *dots = kernel(
    *operands, blocks.expert, blocks.block, blocks.used
  )
  return dg_RF, du_RF, a_RF, *(jnp.sum(dot, axis=0) for dot in dots)


def _store_all(values, out_refs, staged, group, row, col) -> None:
  """Each value of a warpgroup to its own array, at the same place."""
  for value, out_ref in zip(values, out_refs, strict=True):

    def place(r, rows, c, cols, out_ref=out_ref):
      return out_ref.at[pl.ds(row + r, rows), pl.ds(col + c, cols)]

    chip.store(value.astype(staged.dtype), staged, group, place)
