"""On NVIDIA GPUs, in Pallas's Triton: a program a row, at the speed of memory.

XLA's own gather moved half of what an H200 can.
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jmoe.kernels.varying import struct

_MOST = 1024  # columns of a step
_LOOKED_AT = 32  # rows of which one program finds those that no token goes to
UNREAD = -1  # in place of a row's token: what is there may be anything


def take(rows_ND: Array, index_R: Array, *, interpret: bool = False) -> Array:
  """`rows[index]`, zero where the index is past the end."""
  (N, D), R = rows_ND.shape, index_R.shape[0]
  return _call(
    functools.partial(_take, num_rows=N),
    (struct((R, D), rows_ND.dtype, rows_ND),),
    name="take_rows",
    interpret=interpret,
  )(index_R, rows_ND)[0]


def spread(
  x_TD: Array, row_TK: Array, token_R: Array, *, interpret: bool = False
) -> Array:
  """Each token's row at each of its places; zero where no token goes but `UNREAD`.

  A program reads a token once and writes it k times: in the order of the rows it would
  be read k times, mostly from memory.
  """
  (T, D), R = x_TD.shape, token_R.shape[0]
  return _call(
    functools.partial(_spread, num_tokens=T),
    (struct((R, D), x_TD.dtype, x_TD),),
    name="spread_rows",
    interpret=interpret,
    programs=T + pl.cdiv(R, _LOOKED_AT),
  )(row_TK, token_R, x_TD)[0]


def weighed(
  rows_ND: Array,
  index_R: Array,
  weight_R: Array,
  other_RD: Array,
  *,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """(`weight rows[index]` in the dtype of `other`, f32 `<other, rows[index]>`).

  Both are zero where the index is past the end; `other` is not read there.
  """
  (N, D), R = rows_ND.shape, index_R.shape[0]
  out = (
    struct((R, D), other_RD.dtype, other_RD),
    struct((R,), jnp.float32, other_RD),
  )
  kernel = functools.partial(_weighed, num_rows=N)
  call = _call(kernel, out, name="weigh_rows", interpret=interpret)
  return call(index_R, rows_ND, weight_R.astype(jnp.float32), other_RD)


def unwritten(rows_ND: Array, num_rows: int, *, interpret: bool = False) -> Array:
  """`[num_rows, D]` of anything, not before the rows are there."""
  out = struct((num_rows, rows_ND.shape[1]), rows_ND.dtype, rows_ND)
  call = _call(_unwritten, (out,), name="unwritten", interpret=interpret, programs=1)
  return call(rows_ND)[0]


def _take(index_ref, rows_ref, out_ref, *, num_rows: int):
  r = pl.program_id(0)
  index = index_ref[r]
  there = index < num_rows
  index = jnp.where(there, index, 0)
  for cols, inside in _columns(out_ref.shape[1]):
    mask = inside & there
    found = plt.load(rows_ref.at[index, cols], mask=mask, other=0.0)
    plt.store(out_ref.at[r, cols], found, mask=inside)


def _spread(row_ref, token_ref, x_ref, out_ref, *, num_tokens: int):
  t = pl.program_id(0)
  (R, D), k = out_ref.shape, row_ref.shape[1]

  @pl.when(t < num_tokens)
  def _():
    places = [row_ref[t, j] for j in range(k)]
    for cols, inside in _columns(D):
      found = plt.load(x_ref.at[t, cols], mask=inside, other=0.0)
      for row in places:
        there = row < R
        row = jnp.where(there, row, 0)
        plt.store(out_ref.at[row, cols], found, mask=inside & there)

  @pl.when(t >= num_tokens)
  def _():
    first = (t - num_tokens) * _LOOKED_AT
    for n in range(_LOOKED_AT):
      row = jnp.minimum(first + n, R - 1)
      nobody = token_ref[row] >= num_tokens
      for cols, inside in _columns(D):
        zero = jnp.zeros(cols.shape, out_ref.dtype)
        plt.store(out_ref.at[row, cols], zero, mask=inside & nobody)


def _weighed(
  index_ref, rows_ref, weight_ref, other_ref, out_ref, dot_ref, *, num_rows: int
):
  r = pl.program_id(0)
  index = index_ref[r]
  there = index < num_rows
  index = jnp.where(there, index, 0)
  weight = weight_ref[r]
  total = jnp.zeros((_width(out_ref.shape[1]),), jnp.float32)
  for cols, inside in _columns(out_ref.shape[1]):
    mask = inside & there
    found = plt.load(rows_ref.at[index, cols], mask=mask, other=0.0)
    found = found.astype(jnp.float32)
    other = plt.load(other_ref.at[r, cols], mask=mask, other=0.0)
    total += found * other.astype(jnp.float32)
    plt.store(out_ref.at[r, cols], (found * weight).astype(out_ref.dtype), mask=inside)
  dot_ref[r] = jnp.sum(total)


def _unwritten(*_):
  pass


def _width(num_cols: int) -> int:
  return min(_MOST, pl.next_power_of_2(num_cols))


def _columns(num_cols: int):
  """(columns, which of them exist) of each step."""
  width = _width(num_cols)
  for first in range(0, num_cols, width):
    cols = first + jnp.arange(width, dtype=jnp.int32)
    yield cols, cols < num_cols


def _call(kernel, out, *, name: str, interpret: bool, programs: int | None = None):
  """A call with a program for each row of the first array, or as many as are asked."""
  anywhere = pl.BlockSpec(memory_space=pl.ANY)

  def call(*arrays):
    return pl.pallas_call(
      kernel,
      grid=(programs or arrays[0].shape[0],),
      in_specs=[anywhere] * len(arrays),
      out_specs=(anywhere,) * len(out),
      out_shape=out,
      compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
      name=name,
      interpret=interpret,
    )(*arrays)

  return call
