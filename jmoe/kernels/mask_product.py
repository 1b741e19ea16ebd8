"""Products of masks with rows: each sum has a few terms that are not zero."""
# SPDX-License-Identifier: Apache-2.0

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from jmoe.kernels.devices import current_device
from jmoe.kernels.split_product import letters, narrow_einsum, parts
from jmoe.kernels.varying import together
from jmoe.types import wide

_NARROW = ("ampere", "hopper", "tpu")  # they multiply bfloat16


def mask_product(subscripts: str, mask: Array, rows: Array, dtype: Any) -> Array:
  """`einsum` of a mask and rows, formed in float32 at least and rounded once.

  A row must arrive as it left, so no product may round a number of the mask.  Float32
  products do not, and are slow on what multiplies bfloat16.  Of bfloat16 rows it is as
  many bfloat16 products instead as the mask's numbers have parts there: one where they
  are bfloat16 too, three where they are float32.  The mask's gradient is one product.
  `jax.jvp` does not pass those.

  Args:
    subscripts: of two operands.
    mask: zeros and weights, f32 or in the rows' dtype.
    rows: what is moved; one that is not finite may give NaN for infinity.
    dtype: of the result.

  Returns:
    What the subscripts say, in that dtype.
  """
  if rows.dtype == jnp.bfloat16 == dtype and current_device() in _NARROW:
    return _by_parts(subscripts, None, *together(mask, rows))
  kind = wide(mask, rows)
  return jnp.einsum(
    subscripts,
    mask.astype(kind),
    rows.astype(kind),
    precision=jax.lax.Precision.HIGHEST,
  ).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_parts(subscripts: str, at: Any, mask: Array, rows: Array) -> Array:
  """The product.

  Args:
    subscripts: of two operands.
    at: the result's sharding, or None.
    mask: zeros and weights.
    rows: bf16, as the result is.
  """
  found = parts(mask)
  mask_of, rows_of, out = letters(subscripts)
  sizes = dict(zip(mask_of + rows_of, mask.shape + rows.shape, strict=True))
  if len(found) > 1 and rows.size < math.prod(sizes[letter] for letter in out):
    # Parts are more terms of one sum: rows are fewer than float32 results would be.
    mask, rows = jnp.stack(found), jnp.broadcast_to(rows, (len(found), *rows.shape))
    subscripts = f"p{mask_of},p{rows_of}->{out}"
    return narrow_einsum(subscripts, mask, rows, at).astype(rows.dtype)
  first, *rest = (narrow_einsum(subscripts, part, rows, at) for part in found)
  return sum(rest, first).astype(rows.dtype)


def _forward(subscripts: str, at: Any, mask: Array, rows: Array):
  return _by_parts(subscripts, at, mask, rows), (mask, rows)


def _backward(subscripts: str, _: Any, kept: tuple[Array, Array], grad: Array):
  mask, rows = kept
  mask_of, rows_of, out = letters(subscripts)
  d_mask: Any = _of_rows(f"{out},{rows_of}->{mask_of}", _place(mask), grad, rows)
  d_rows = _by_parts(f"{mask_of},{out}->{rows_of}", _place(rows), mask, grad)
  return d_mask.astype(mask.dtype), d_rows


_by_parts.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_rows(subscripts: str, at: Any, a: Array, b: Array) -> Array:
  return narrow_einsum(subscripts, a, b, at)


def _of_rows_backward(subscripts: str, _: Any, kept: tuple[Array, Array], grad: Array):
  # A second derivative: rare, and in full float32.
  a_of, b_of, out = letters(subscripts)
  of = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  (a, b), (a_wide, b_wide) = kept, (x.astype(jnp.float32) for x in kept)
  d_a = of(f"{out},{b_of}->{a_of}", grad, b_wide, out_sharding=_place(a))
  d_b = of(f"{a_of},{out}->{b_of}", a_wide, grad, out_sharding=_place(b))
  return d_a.astype(a.dtype), d_b.astype(b.dtype)


_of_rows.defvjp(lambda s, at, a, b: (_of_rows(s, at, a, b), (a, b)), _of_rows_backward)


def _place(x: Array) -> Any:
  """Where an array's type says that it lies, if a mesh's axes are explicit."""
  sharding = jax.typeof(x).sharding
  return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
