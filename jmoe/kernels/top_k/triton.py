"""On NVIDIA GPUs, in Pallas's Triton: rows are read once and searched on the chip."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jmoe.kernels.varying import struct

_TILE = 4096  # values of a program
_NONE = jnp.iinfo(jnp.int32).min  # below every value


def top_k(values_TE: Array, k: int, *, interpret: bool = False) -> Array:
  """i32[T,K] the columns of each row's k highest values, the highest first."""
  T, E = values_TE.shape
  width = pl.next_power_of_2(E)
  rows = max(1, min(_TILE // width, pl.next_power_of_2(T)))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(_top_k, rows=rows, width=width),
    grid=(pl.cdiv(T, rows),),
    in_specs=[anywhere],
    out_specs=anywhere,
    out_shape=struct((T, k), jnp.int32, values_TE),
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
    name="top_k",
    interpret=interpret,
  )(values_TE)


def _top_k(values_ref, out_ref, *, rows: int, width: int):
  (T, E), k = values_ref.shape, out_ref.shape[1]
  row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
  col = jnp.arange(width, dtype=jnp.int32)
  there = (row < T)[:, None] & (col < E)[None, :]
  at = values_ref.at[row[:, None], col[None, :]]
  values = plt.load(at, mask=there, other=0.0).astype(jnp.float32)
  # Floats in the order of whole numbers, as `jax.lax.top_k` sorts them.
  bits = jax.lax.bitcast_convert_type(values, jnp.int32)
  key = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
  key = jnp.where(there, jnp.maximum(key, _NONE + 1), _NONE)
  for j in range(k):
    best = jax.lax.argmax(key, 1, jnp.int32)  # the first of equals
    plt.store(out_ref.at[row, j], best, mask=row < T)
    key = jnp.where(col[None, :] == best[:, None], _NONE, key)
