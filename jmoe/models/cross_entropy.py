"""The loss of a vocabulary without its logits: some tokens at a time.

Of 16,384 tokens and a vocabulary of 50,304 the logits alone are 3.3 GB in float32, and
their gradient as much again.  Here both exist for one chunk of tokens, and the chunk's
share of the gradient is formed while its logits are there: three products in all, as
many as without chunks.  So the forward pass of a loss that is differentiated makes the
gradient, of the size of the matrix and of the hidden states; the backward pass scales
it.

C tokens of a chunk, V entries of the vocabulary; the other letters are those of
`jmoe.types`.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.loops import dot
from jmoe.kernels.varying import together, zeros
from jmoe.types import wide

_LOGITS = 2**27  # of a chunk, unless it is said: half a GiB of float32


def cross_entropy(
  x_TD: Array,
  matrix_DV: Array,
  target_T: Array,
  weight_T: Array,
  *,
  z_loss: float = 0.0,
  chunk: int | None = None,
) -> tuple[Array, Array]:
  """The weighted sum of `-log softmax(x matrix)[target]` over tokens.

  Sums are in at least float32.  Both products take their operands in the wider of the
  two dtypes: bfloat16 with bfloat16 stays so (float16 becomes float32), and the logits'
  gradient is rounded to it.

  Args:
    x_TD: hidden states.
    matrix_DV: into the vocabulary; of a tied embedding its transpose.
    target_T: i32[T]; a counted token whose target is no entry of the vocabulary makes
      the loss NaN.
    weight_T: f32[T]; tokens of weight zero are ignored, whatever they hold, and give
      zero gradient, to their weight too.
    z_loss: weight of the squared log of the softmax's denominator, per token beside its
      nats (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    chunk: tokens at a time; None: a power of two that gives 2**27 logits at most.

  Returns:
    (f32[] the sum, f32[T] nats of each token without weight, zero where ignored).  The
    sum has a gradient in x, matrix and weight, to be taken once; the nats have none.

  Raises:
    ValueError: shapes that do not fit, or a chunk that is no positive integer.
  """
  _check(x_TD, matrix_DV, target_T, weight_T, chunk)
  (T, V), dtype = (x_TD.shape[0], matrix_DV.shape[1]), _operands(x_TD, matrix_DV)
  if chunk is None:
    chunk = default_chunk(V)
  x_TD, matrix_DV = x_TD.astype(dtype), matrix_DV.astype(dtype)
  weight_T = weight_T.astype(wide(x_TD))
  operands = together(x_TD, matrix_DV, target_T, weight_T)
  both: Any = _summed(min(chunk, T), float(z_loss), *operands)
  loss, nats_T = both
  return loss, jax.lax.stop_gradient(nats_T)


def default_chunk(vocab_size: int) -> int:
  """Tokens at a time: a power of two of no more than 2**27 logits, at least 128."""
  return 2 ** max(7, int(math.log2(_LOGITS / vocab_size)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
  chunk: int,
  z_loss: float,
  x_TD: Array,
  matrix_DV: Array,
  target_T: Array,
  weight_T: Array,
) -> tuple[Array, Array]:
  def piece(loss, x_CD, target_C, weight_C):
    one, nats_C, *_ = _chunk(z_loss, x_CD, matrix_DV, target_C, weight_C)
    return loss + one, (nats_C,)

  start = zeros((), weight_T.dtype, x_TD)
  loss, (nats_T,) = _by_chunks(piece, chunk, start, x_TD, target_T, weight_T)
  return loss, nats_T


def _forward(chunk, z_loss, x_TD, matrix_DV, target_T, weight_T):
  def piece(carry, x_CD, target_C, weight_C):
    loss, dmatrix_DV = carry
    one, nats_C, slope_C, x_CD, dlogits_CV = _chunk(
      z_loss, x_CD, matrix_DV, target_C, weight_C
    )
    dlogits_CV = dlogits_CV.astype(x_CD.dtype)
    dx_CD = dot(dlogits_CV, matrix_DV, 1, 1).astype(x_CD.dtype)
    dmatrix_DV += dot(x_CD, dlogits_CV, 0, 0)
    return (loss + one, dmatrix_DV), (nats_C, slope_C, dx_CD)

  sums = weight_T.dtype
  start = zeros((), sums, x_TD), zeros(matrix_DV.shape, sums, x_TD)
  (loss, dmatrix_DV), (nats_T, slope_T, dx_TD) = _by_chunks(
    piece, chunk, start, x_TD, target_T, weight_T
  )
  return (loss, nats_T), (dx_TD, dmatrix_DV.astype(matrix_DV.dtype), slope_T)


def _backward(chunk, z_loss, residual, cotangents):
  del chunk, z_loss
  dx_TD, dmatrix_DV, slope_T = residual
  by = cotangents[0]

  def scaled(x):
    return (x.astype(wide(x)) * by).astype(x.dtype)

  return scaled(dx_TD), scaled(dmatrix_DV), None, scaled(slope_T)


_summed.defvjp(_forward, _backward)


def _chunk(z_loss, x_CD, matrix_DV, target_C, weight_C):
  """(loss, nats_C, the loss's slope in weight_C, x_CD as read, dlogits_CV)."""
  counts_C = weight_C != 0
  # What an ignored token holds, NaN too, must not reach the matrix's gradient.
  x_CD = jnp.where(counts_C[:, None], x_CD, 0)
  logits_CV = dot(x_CD, matrix_DV, 1, 0)
  V = logits_CV.shape[1]
  log_sum_C = jax.nn.logsumexp(logits_CV, axis=1)
  entry_C = jnp.clip(target_C, 0, V - 1)
  picked_C = jnp.take_along_axis(logits_CV, entry_C[:, None], axis=1)[:, 0]
  picked_C = jnp.where(target_C == entry_C, picked_C, jnp.nan)
  nats_C = jnp.where(counts_C, log_sum_C - picked_C, 0)
  slope_C = jnp.where(counts_C, nats_C + z_loss * jnp.square(log_sum_C), 0)
  share_CV = jnp.exp(logits_CV - log_sum_C[:, None])
  share_CV *= (1 + 2 * z_loss * log_sum_C)[:, None]
  is_target_CV = jnp.arange(V, dtype=entry_C.dtype) == entry_C[:, None]
  dlogits_CV = weight_C[:, None] * (share_CV - is_target_CV.astype(share_CV.dtype))
  return jnp.sum(weight_C * slope_C), nats_C, slope_C, x_CD, dlogits_CV


def _by_chunks(piece, chunk, carry, *arrays):
  """`(carry, outputs) = piece(carry, *some)` along arrays, the rest at the end.

  A loop, though it is short, so that no two chunks' logits exist at once.
  """
  T = arrays[0].shape[0]
  whole = T // chunk * chunk
  if whole == T == chunk:
    return piece(carry, *arrays)
  parts = [x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in arrays]
  carry, out = jax.lax.scan(lambda c, some: piece(c, *some), carry, parts)
  out = [y.reshape(whole, *y.shape[2:]) for y in out]
  if whole < T:
    carry, rest = piece(carry, *(x[whole:] for x in arrays))
    out = [jnp.concatenate(pair) for pair in zip(out, rest, strict=True)]
  return carry, tuple(out)


def _operands(x: Array, matrix: Array):
  """The dtype that products are formed in."""
  alike = x.dtype == matrix.dtype and x.dtype != jnp.float16
  return jnp.dtype(x.dtype if alike else wide(x, matrix))


def _check(x, matrix, target, weight, chunk) -> None:
  T = x.shape[0] if x.ndim else 0
  shapes = (x.ndim, matrix.ndim, target.shape, weight.shape) == (2, 2, (T,), (T,))
  if not (shapes and T and x.shape[1] == matrix.shape[0]):
    raise ValueError(
      f"cross_entropy: x{x.shape}, matrix{matrix.shape}, target{target.shape}, "
      f"weight{weight.shape}; expected [T,D], [D,V], [T] and [T] with T of one or more."
    )
  number = isinstance(chunk, int) and not isinstance(chunk, bool)
  if chunk is not None and not (number and chunk > 0):
    raise ValueError(
      f"cross_entropy: chunk={chunk!r}; give a positive integer, or None to choose."
    )
