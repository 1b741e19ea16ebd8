"""The two kernels of the grouped matmul in Pallas's Triton: of rows, and of matrices.

See `triton.py` for what they compute, and for prefixes of names.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jmoe.kernels.grouped_matmul.triton_tiles import (
  Tile,
  matrices_tile,
  precision,
  row_tile,
  rows_tile,
)
from jmoe.kernels.row_blocks import in_bands, used_blocks
from jmoe.kernels.varying import like, struct, together
from jmoe.types import Groups


def rows_kernel(
  groups: Groups,
  x_RD: Array,
  w_EDF: Array,
  *biases: Array,
  transpose: bool,
  out: Any,
  interpret: bool,
) -> Array:
  """`[R,F]`; operands are rows, matrices, and biases if there are any."""
  R, D = x_RD.shape
  F = w_EDF.shape[1 if transpose else 2]
  dtype = np.result_type(x_RD.dtype, w_EDF.dtype)
  tile = rows_tile(row_tile(groups.block), F, dtype)
  assert R % tile.rows == 0, (R, tile)
  cols = pl.cdiv(F, tile.cols)
  blocks = used_blocks(groups, R, tile.rows)

  def body(x_ref, w_ref, *refs):
    *bias_refs, expert_ref, block_ref, used_ref, y_ref = refs
    t, used = pl.program_id(0), used_ref[0]

    @pl.when(t < used * cols)
    def _():
      which, column = in_bands(t, used, cols, tile.band)
      e, row, col = expert_ref[which], block_ref[which] * tile.rows, column * tile.cols
      x_rows, w_cols = pl.ds(row, tile.rows), pl.ds(col, tile.cols)
      no_cols = _inside(col, tile.cols, F)

      def step(k, total):
        at = k * tile.depth
        depth, no_depth = pl.ds(at, tile.depth), _inside(at, tile.depth, D)
        x = _load(x_ref.at[x_rows, depth], None, no_depth)
        if transpose:
          w = _load(w_ref.at[e, w_cols, depth], no_cols, no_depth)
        else:
          w = _load(w_ref.at[e, depth, w_cols], no_depth, no_cols)
        return total + _dot(x, w, 1, int(transpose), dtype, interpret)

      total = jnp.zeros((tile.rows, tile.cols), jnp.float32)
      total = lax.fori_loop(0, pl.cdiv(D, tile.depth), step, total)
      for ref in bias_refs:
        total += _load(ref.at[e, w_cols], no_cols).astype(jnp.float32)[None, :]
      _store(y_ref.at[x_rows, w_cols], total.astype(out), None, no_cols)

  name = "grouped_matmul_transposed" if transpose else "grouped_matmul"
  grid = R // tile.rows * cols
  made = struct((R, F), out, x_RD, w_EDF)
  call = _launch(body, made, tile, grid=grid, name=name, interpret=interpret)
  return call(x_RD, w_EDF, *biases, blocks.expert, blocks.block, blocks.used)


def matrices_kernel(
  groups: Groups, x_RD: Array, y_RF: Array, *, out: Any, interpret: bool
) -> Array:
  """`[E,D,F]`."""
  D, F, E = x_RD.shape[1], y_RF.shape[1], groups.start.shape[0]
  dtype = np.result_type(x_RD.dtype, y_RF.dtype)
  tile = matrices_tile(F, row_tile(groups.block), dtype)
  rows, cols = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.cols)

  def body(x_ref, y_ref, start_ref, rows_ref, w_ref):
    t = pl.program_id(0)
    e = lax.div(t, jnp.int32(rows * cols))
    within = t - e * (rows * cols)
    row, col = in_bands(within, jnp.int32(rows), cols, min(tile.band, rows))
    row, col = row * tile.rows, col * tile.cols
    first, count = start_ref[e], rows_ref[e]
    w_rows, w_cols = pl.ds(row, tile.rows), pl.ds(col, tile.cols)
    no_rows, no_cols = _inside(row, tile.rows, D), _inside(col, tile.cols, F)

    def step(k, total):
      at = k * tile.depth
      depth, real = pl.ds(first + at, tile.depth), _inside(at, tile.depth, count)
      x = _load(x_ref.at[depth, w_rows], real, no_rows)
      y = _load(y_ref.at[depth, w_cols], real, no_cols)
      return total + _dot(x, y, 0, 0, dtype, interpret)

    total = jnp.zeros((tile.rows, tile.cols), jnp.float32)
    steps = lax.div(count + (tile.depth - 1), jnp.int32(tile.depth))
    total = lax.fori_loop(jnp.int32(0), steps, step, total)
    _store(w_ref.at[e, w_rows, w_cols], total.astype(out), no_rows, no_cols)

  made = struct((E, D, F), out, x_RD, y_RF)
  name, grid = "grouped_matmul_matrices", E * rows * cols
  call = _launch(body, made, tile, grid=grid, name=name, interpret=interpret)
  return call(x_RD, y_RF, groups.start, groups.rows)


def _inside(first: Any, size: int, end: Any) -> Array | None:
  """bool[size] which of the places from `first` on exist; None where all do."""
  if isinstance(end, int) and end % size == 0:
    return None
  return first + jnp.arange(size, dtype=jnp.int32) < end


def _mask(shape: tuple[int, ...], *inside: Array | None) -> Array | None:
  """Of a tile, from those of its dimensions."""
  mask = None
  for n, one in enumerate(inside):
    if one is not None:
      one = lax.broadcast_in_dim(one, shape, (n,))
      mask = one if mask is None else mask & one
  return mask


def _load(ref: Any, *inside: Array | None) -> Array:
  """A tile, zero where its array has ended."""
  mask = _mask(ref.shape, *inside)
  return plt.load(ref, mask=mask, other=None if mask is None else 0.0)


def _store(ref: Any, value: Array, *inside: Array | None) -> None:
  plt.store(ref, value, mask=_mask(value.shape, *inside))


def _dot(
  a: Array, b: Array, over_a: int, over_b: int, dtype: Any, exact: bool
) -> Array:
  """float32 `a . b` over one dimension of each."""
  return lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((over_a,), (over_b,)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else precision(dtype),
    preferred_element_type=jnp.float32,
  )


def _launch(
  body: Callable[..., None],
  out: Any,
  tile: Tile,
  *,
  grid: int,
  name: str,
  interpret: bool,
) -> Callable[..., Any]:
  anywhere = pl.BlockSpec(memory_space=pl.ANY)

  def call(*operands):
    operands = together(*operands)
    made = pl.pallas_call(
      body,
      grid=(grid,),
      in_specs=[anywhere] * len(operands),
      out_specs=anywhere,
      out_shape=out,
      compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
      name=name,
      interpret=interpret,
    )(*operands)
    return like(made, *operands)

  return call
