"""Products of masks with rows: each sum has a few terms that are not zero."""
# SPDX-License-Identifier: Apache-2.0

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import current_device
from jmoe.kernels.split_product import letters, narrow_einsum, parts
from jmoe.kernels.varying import together
from jmoe.types import wide


def mask_product(subscripts: str, mask: Array, rows: Array, dtype: Any) -> Array:
  """`einsum` of a mask and rows, formed in float32 at least and rounded once.

  A row must arrive as it left, so no product may round a number of the mask.  Float32
  products do not, and are slow on what multiplies bfloat16.  Of bfloat16 rows it is as
  many bfloat16 products instead as the mask's numbers have parts there: one where they
  are bfloat16 too, three where they are float32.

  Args:
    subscripts: of two operands.
    mask: zeros and weights, in the rows' dtype or wider.
    rows: what is moved.
    dtype: of the result.
  """
  if rows.dtype == jnp.bfloat16 == dtype and current_device() in _NARROW:
    return _by_parts(subscripts, *together(mask, rows))
  kind = wide(mask, rows)
  return jnp.einsum(
    subscripts,
    mask.astype(kind),
    rows.astype(kind),
    precision=jax.lax.Precision.HIGHEST,
  ).astype(dtype)


_NARROW = ("ampere", "hopper", "tpu")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_parts(subscripts: str, mask: Array, rows: Array) -> Array:
  found = parts(mask)
  mask_of, rows_of, out = letters(subscripts)
  sizes = dict(zip(mask_of + rows_of, mask.shape + rows.shape, strict=True))
  if len(found) > 1 and rows.size < math.prod(sizes[letter] for letter in out):
    # Parts are more terms of one sum: rows are fewer than float32 results would be.
    mask, rows = jnp.stack(found), jnp.broadcast_to(rows, (len(found), *rows.shape))
    return narrow_einsum(f"p{mask_of},p{rows_of}->{out}", mask, rows).astype(rows.dtype)
  first, *rest = (narrow_einsum(subscripts, part, rows) for part in found)
  return sum(rest, first).astype(rows.dtype)


def _forward(subscripts: str, mask: Array, rows: Array):
  return _by_parts(subscripts, mask, rows), (mask, rows)


def _backward(subscripts: str, kept: tuple[Array, Array], grad: Array):
  mask, rows = kept
  mask_of, rows_of, out = letters(subscripts)
  d_mask: Any = narrow_einsum(f"{out},{rows_of}->{mask_of}", grad, rows)
  d_rows = _by_parts(f"{mask_of},{out}->{rows_of}", mask, grad)
  return d_mask.astype(mask.dtype), d_rows


_by_parts.defvjp(_forward, _backward)
