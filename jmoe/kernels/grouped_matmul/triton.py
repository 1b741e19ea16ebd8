"""Grouped matmul in Pallas's Triton: NVIDIA GPUs of compute capability 8.0 and up.

Bfloat16, float16 and float32, with float32 sums.  One program makes one output tile,
whose rows are of one expert.  The grid is static: programs past the tiles that hold
rows return at once, so that blocks without rows are neither read nor written, and what
stands there after a call is whatever was in memory.  Padding rows may hold anything:
the gradients of matrices and biases read only rows that exist.

Prefixes of names: `x` rows that go in, `y` rows that come out.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jmoe.kernels.folding import foldable
from jmoe.kernels.row_blocks import in_bands, sums, used_blocks
from jmoe.kernels.varying import like, struct, together
from jmoe.types import Groups

_ONE, _THREE = (
  lax.DotAlgorithmPreset.TF32_TF32_F32,
  lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
)
_ASKED = {  # of jax's default precision -> of float32 tiles
  "tensorfloat32": _ONE,
  "tf32_tf32_f32": _ONE,
  "high": _THREE,
  "tf32_tf32_f32_x3": _THREE,
}


@dataclasses.dataclass(frozen=True)
class Tile:
  """An output tile of one program.

  Args:
    rows, cols: of the output.
    depth: of the contracted dimension in a step.
    warps: that share it.
    stages: steps whose operands are on their way or in shared memory.
    band: row tiles that are walked before the next column tile.
  """

  rows: int
  cols: int
  depth: int
  warps: int = 4
  stages: int = 3
  band: int = 8


def row_tile(block: int) -> int:
  """Rows of a tile for a layout aligned to `block`, a multiple of 16."""
  return next(rows for rows in (64, 32, 16) if block % rows == 0)


def rows_tile(rows: int, cols: int, dtype: Any) -> Tile:
  """The tile for rows times matrices.

  Two at a time fit the registers of a multiprocessor, and the 100 KiB of shared memory
  that small chips have.

  Args:
    rows: of a tile, from `row_tile`.
    cols: of the output.
    dtype: of the operands.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return Tile(rows, 128 if cols > 64 else 64, 16, stages=4)
  if rows == 64:
    return Tile(rows, 256 if cols > 128 else 128, 32)
  return Tile(rows, 128, 64)  # few rows: what counts is how fast matrices come


def matrices_tile(cols: int, depth: int, dtype: Any) -> Tile:
  """The tile for a matrix's gradient.

  Args:
    cols: of the matrix.
    depth: rows to which the layout is aligned, from `row_tile`.
    dtype: of the operands.
  """
  width = 128 if cols > 64 else 64
  if jnp.dtype(dtype) == jnp.float32:
    return Tile(64, width, 16, stages=4)
  return Tile(128, width, min(depth, 32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def triton(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; undefined in blocks without rows.

  Args:
    x_RD: rows grouped by expert.
    w_EDF: a matrix per expert.
    groups: aligned to a multiple of 16 rows.
    bias_EF: a bias per expert, or None.
    dtype: of the result; None: x's.
    interpret: run in plain jax, anywhere.
  """
  out = dtype or x_RD.dtype
  return rows(x_RD, w_EDF, groups, bias_EF, dtype=out, interpret=interpret)


def _forward(x_RD, w_EDF, groups, bias_EF, dtype, interpret):
  y_RF = triton(x_RD, w_EDF, groups, bias_EF, dtype, interpret)
  return y_RF, (x_RD, w_EDF, groups, bias_EF)


def _backward(dtype, interpret, residual, dy_RF):
  del dtype
  x_RD, w_EDF, groups, bias_EF = residual
  dy_RF = dy_RF.astype(x_RD.dtype)
  dx_RD = rows(
    dy_RF, w_EDF, groups, transpose=True, dtype=x_RD.dtype, interpret=interpret
  )
  dw_EDF = matrices(x_RD, dy_RF, groups, dtype=w_EDF.dtype, interpret=interpret)
  d_bias = None
  if bias_EF is not None:
    d_bias = sums(dy_RF, groups, row_tile(groups.block)).astype(bias_EF.dtype)
  return dx_RD, dw_EDF, None, d_bias


triton.defvjp(_forward, _backward)


def rows(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  *,
  transpose: bool = False,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`x_r w_e(r) + bias_e(r)`, or with the matrices transposed; `[R,F]`.

  Args:
    x_RD: rows.
    w_EDF: matrices [E,D,F] (transposed: [E,F,D]).
    groups: aligned to a multiple of 16 rows.
    bias_EF: biases, or None.
    transpose: contract the matrices' last dimension instead of the one before it.
    dtype: of the result; None: x's.
    interpret: run in plain jax.
  """
  kernel = functools.partial(
    _rows_kernel, transpose=transpose, out=dtype or x_RD.dtype, interpret=interpret
  )
  biases = () if bias_EF is None else (bias_EF,)
  return foldable(kernel)(groups, x_RD, w_EDF, *biases)


def matrices(
  x_RD: Array,
  y_RF: Array,
  groups: Groups,
  *,
  dtype: Any = None,
  interpret: bool = False,
) -> Array:
  """`[E,D,F]` the sum of `x_r y_r^T` over each expert's rows; zero without any."""
  out = dtype or x_RD.dtype
  kernel = functools.partial(_matrices_kernel, out=out, interpret=interpret)
  return foldable(kernel)(groups, x_RD, y_RF)


def precision(dtype: Any) -> Any:
  """How tiles are multiplied.

  Float32 products are float32's own, outside of the tensor cores.  Their TF32 products
  keep three digits, and three of them a product keep less than float32 in deep sums,
  which tensor cores truncate; both are for who asks jax for them, by
  `jax.default_matmul_precision("tensorfloat32")` and `"high"`.
  """
  if jnp.dtype(dtype) != jnp.float32:
    return lax.Precision.DEFAULT  # exact products, float32 sums
  asked: Any = getattr(jax.config, "jax_default_matmul_precision", None)
  return _ASKED.get(str(asked).lower(), lax.Precision.HIGHEST)


def _rows_kernel(
  groups: Groups,
  x_RD: Array,
  w_EDF: Array,
  *biases: Array,
  transpose: bool,
  out: Any,
  interpret: bool,
) -> Array:
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


def _matrices_kernel(
  groups: Groups, x_RD: Array, y_RF: Array, *, out: Any, interpret: bool
) -> Array:
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
