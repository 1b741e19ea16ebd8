"""Float32 products on tensor cores: what is wider than bfloat16 is split into parts.

A float32 is the sum of three bfloat16 numbers of its own sign, cut off rather than
rounded: so the first one cannot overflow.  Products of such parts are exact in float32.
Of jax's own presets, `DotAlgorithmPreset.BF16_BF16_F32_X6` and `X9` split bfloat16
operands too and are two and three times the work, `X3` leaves out the third part, and
CPUs do not have all of them.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import current_device
from jmoe.kernels.varying import together

# Tensor cores cut their sums off where float32 units round them: after 2048 products
# the error is five times as large, after 32768 it is 25 times.  Of this many products
# it is about as large; longer sums are added up outside of tensor cores.
_CHUNK = 1024
# Pairs of parts of two split operands down to 2**-16 of the largest, which comes last.
_PAIRS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))


def splits(tokens: Array, matrix: Array) -> bool:
  """Whether `split_product` is this device's faster way to an exact product.

  Not for float32 tokens (six products for one), nor for float16 ones, which are no
  bfloat16 numbers and whose own type has no room for parts of small weights.
  """
  kinds = tokens.dtype == jnp.bfloat16 and matrix.dtype in (jnp.bfloat16, jnp.float32)
  # Older and other GPUs may have no bfloat16 units; on TPUs it was not measured.
  return kinds and current_device() in ("ampere", "hopper")


def split_product(subscripts: str, tokens: Array, matrix: Array) -> Array:
  """f32 `einsum` of bfloat16 and float32, as exact as float32's own.

  Infinities and NaN give what they give in float32.  In the tokens' gradient, a sum
  over few products that is rounded to bfloat16, they give NaN.

  Args:
    subscripts: of two operands, without "...", "p" or "z" and without batch dimensions.
    tokens: bf16, one part.
    matrix: bf16 or f32.
  """
  return _product(subscripts, *together(tokens, matrix))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, tokens: Array, matrix: Array) -> Array:
  first, *rest = parts(matrix)
  found = _in_chunks(subscripts, tokens, first)
  if not rest:
    return found
  of, matrix_of, out = letters(subscripts)
  new = next(letter for letter in matrix_of if letter in out)  # its parts are columns
  stacked = jnp.stack(rest, matrix_of.index(new))
  wide = f"{of},{matrix_of.replace(new, 'p' + new)}->{out.replace(new, 'p' + new)}"
  small = jnp.sum(narrow_einsum(wide, tokens, stacked), axis=out.index(new))
  # Of what is not finite the other parts are zero, and zero times infinity is NaN.
  return jnp.where(jnp.isfinite(found), found + small, found)


def _forward(subscripts: str, tokens: Array, matrix: Array):
  return _product(subscripts, tokens, matrix), (tokens, matrix)


def _backward(subscripts: str, kept: tuple[Array, Array], grad: Array):
  tokens, matrix = kept
  of, matrix_of, out = letters(subscripts)
  d_tokens: Any = _of_two(f"{out},{matrix_of}->{of}", grad, matrix)
  d_matrix: Any = _product(f"{of},{out}->{matrix_of}", tokens, grad)
  return d_tokens.astype(tokens.dtype), d_matrix.astype(matrix.dtype)


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_two(subscripts: str, a: Array, b: Array) -> Array:
  """Of two operands that may both be split: their parts are more terms of one sum."""
  a_parts, b_parts = parts(a), parts(b)
  pairs = [(i, j) for i, j in _PAIRS if i < len(a_parts) and j < len(b_parts)]
  a_of, b_of, out = letters(subscripts)
  shared = next(letter for letter in a_of if letter in b_of)
  wide = f"{a_of.replace(shared, 'p' + shared)},{b_of.replace(shared, 'p' + shared)}"
  return narrow_einsum(
    f"{wide}->{out}",
    jnp.stack([a_parts[i] for i, _ in pairs], a_of.index(shared)),
    jnp.stack([b_parts[j] for _, j in pairs], b_of.index(shared)),
  )


def _of_two_backward(subscripts: str, kept: tuple[Array, Array], grad: Array):
  # A second derivative: rare, and in full float32.
  a_of, b_of, out = letters(subscripts)
  wide = tuple(x.astype(jnp.float32) for x in kept)
  of = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  d_a = of(f"{out},{b_of}->{a_of}", grad, wide[1])
  d_b = of(f"{a_of},{out}->{b_of}", wide[0], grad)
  return d_a.astype(kept[0].dtype), d_b.astype(kept[1].dtype)


_of_two.defvjp(lambda s, a, b: (_of_two(s, a, b), (a, b)), _of_two_backward)


def parts(a: Array) -> list[Array]:
  """bfloat16 arrays whose sum is `a`, the largest first; of its sign, or zero.

  Exact down to 2**-110 or so, where parts become subnormal.
  """
  if a.dtype == jnp.bfloat16:
    return [a]
  found, rest, finite = [], a, jnp.isfinite(a)
  for _ in range(3):
    # Of bits: XLA may leave out a cast to bfloat16 and back.
    bits = jax.lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
    part = jnp.where(finite, jax.lax.bitcast_convert_type(bits, jnp.float32), rest)
    found.append(part.astype(jnp.bfloat16))
    rest = jnp.where(finite, rest - part, 0)
  return found


def _in_chunks(subscripts: str, a: Array, b: Array) -> Array:
  """`einsum`, sums longer than a chunk added up in float32."""
  a_of, b_of, out = letters(subscripts)
  size = dict(zip(a_of, a.shape, strict=True))
  shared = max((letter for letter in a_of if letter in b_of), key=size.__getitem__)
  # A power of two, as are the devices over which XLA may have divided the tokens.
  chunks = 1 << (max(1, math.ceil(size[shared] / _CHUNK)) - 1).bit_length()
  if chunks == 1:
    return narrow_einsum(subscripts, a, b)
  wide = f"{a_of.replace(shared, 'z' + shared)},{b_of.replace(shared, 'z' + shared)}"
  a, b = _cut(a, a_of.index(shared), chunks), _cut(b, b_of.index(shared), chunks)
  return jnp.sum(narrow_einsum(f"{wide}->z{out}", a, b), axis=0)


def _cut(a: Array, axis: int, chunks: int) -> Array:
  """With a dimension divided into equal chunks; zeros make up for what is missing."""
  missing = [(0, 0)] * a.ndim
  missing[axis] = (0, -a.shape[axis] % chunks)
  a = jnp.pad(a, missing) if missing[axis][1] else a
  return a.reshape(*a.shape[:axis], chunks, -1, *a.shape[axis + 1 :])


def narrow_einsum(subscripts: str, a: Array, b: Array, at: Any = None) -> Array:
  """f32 `einsum` of two bfloat16 arrays, whose products are exact.

  Args:
    subscripts: as for `jnp.einsum`.
    a: one operand.
    b: the other.
    at: the result's sharding, where a mesh has explicit axes.
  """

  def wide(a, b):  # not every product of bfloat16 runs on a CPU
    of = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return of(subscripts, a, b, out_sharding=at)

  def narrow(a, b):
    fast = jax.lax.Precision.DEFAULT  # whatever the context says: parts are exact
    of = functools.partial(jnp.einsum, precision=fast, out_sharding=at)
    return of(subscripts, a, b, preferred_element_type=jnp.float32)

  return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def letters(subscripts: str) -> tuple[str, str, str]:
  """Those of both operands and of the result."""
  operands, _, out = subscripts.partition("->")
  a, _, b = operands.partition(",")
  return a, b, out
