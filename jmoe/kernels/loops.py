"""Loops over experts and over chunks of their rows: trip counts are data.

Only rows that exist cost anything.  A weight matrix is sliced once per expert, not once
per block: at D=512, F=1024 a slice of 2 MB for every 128 rows costs as much as their
product.  Chunks go from large to small because a large product runs nearer to the
machine's limit.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Groups, wide


def over_experts(groups: Groups, body: Callable[[Array, Any], Any], carry: Any) -> Any:
  """`carry = body(e, carry)` for every expert that has rows, in order."""
  busy_E = groups.rows > 0
  E = busy_E.shape[0]
  _, expert_E = jax.lax.sort(
    ((~busy_E).astype(jnp.int32), jnp.arange(E, dtype=jnp.int32)), num_keys=1
  )
  return jax.lax.fori_loop(
    0,
    jnp.sum(busy_E, dtype=jnp.int32),
    lambda i, carry: body(expert_E[i], carry),
    carry,
  )


def over_chunks(
  groups: Groups,
  e: Array,
  num_rows: int,
  body: Callable[[Array, int, Any], Any],
  carry: Any,
) -> Any:
  """`carry = body(first row, size, carry)` over e's rows, in 8, 2 and 1 blocks.

  The last chunk may run over padding rows, never over another expert's.
  """
  block = groups.block
  row = groups.start[e]
  left = -(-groups.rows[e] // block) * block
  for size in (8 * block, 2 * block, block):
    if size > num_rows:
      continue
    count = left // size
    step = functools.partial(_chunk, body, row, size)
    carry = jax.lax.fori_loop(0, count, step, carry)
    row, left = row + count * size, left - count * size
  return carry


def _chunk(body: Callable, row: Array, size: int, i: Array, carry: Any) -> Any:
  return body(row + i * size, size, carry)


def read(x: Array, row: Array, size: int) -> Array:
  """`x[row : row + size]` at a traced row."""
  return jax.lax.dynamic_slice_in_dim(x, row, size)


def write(x: Array, rows: Array, row: Array) -> Array:
  """`x` with `rows` from a traced row on."""
  return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), row, 0)


def write_expert(x: Array, own: Array, e: Array) -> Array:
  """`x` with its e-th part replaced."""
  return jax.lax.dynamic_update_index_in_dim(x, own.astype(x.dtype), e, 0)


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
  """`a . b` over one dimension of each, summed in at least float32."""
  dims = (((over_a,), (over_b,)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=wide(a))
