"""Rows to other devices, as many to each as there are: a ragged all-to-all.

XLA on CPUs has no such operation; there an all-to-all with room for every row stands in
and gives the same arrays.
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.kernels.devices import GPUS, current_device
from jmoe.kernels.permute_rows import unwritten
from jmoe.kernels.permute_rows.reference import take
from jmoe.kernels.varying import search, together, zeros

Axis = tuple[str, ...]
# Pieces of what a GPU sends to each other one.  XLA's kernel gives every piece a block
# of threads of its own: two H200s move 2.7 GB/s in one piece, and 199 in 512.
PIECES = 512
_LEAST = 16  # rows of a piece, on average


def exchange(
  rows_ND: Array, count_nn: Array, num_rows: int, axis: Axis, *, zero: bool = True
) -> Array:
  """What all devices send this one, in their order, then zeros.

  The gradient goes the same way back.

  Args:
    rows_ND: what this device sends, in the order of the receivers.
    count_nn: i32[n,n] rows from each device to each; the same on all.
    num_rows: of the result; no device may be sent more.
    axis: mesh axes over which the n devices are.
    zero: where false, nobody reads the rows behind those that came, or a gradient's
      behind those that were sent: on an accelerator they hold anything, NaN too.

  Returns:
    `[num_rows, D]`.
  """
  rows_ND, count_nn = together(rows_ND, count_nn)
  return _exchange(rows_ND, count_nn, num_rows, axis, zero)


def room(num_rows: int, like_ND: Array, *, zero: bool) -> Array:
  """`[num_rows, D]` of zeros, or of anything, to be written into."""
  if zero:
    return zeros((num_rows, like_ND.shape[1]), like_ND.dtype, like_ND)
  return unwritten(like_ND, num_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _exchange(
  rows_ND: Array, count_nn: Array, num_rows: int, axis: Axis, zero: bool
) -> Array:
  me = lax.axis_index(axis)
  sent_n, received_n = count_nn[me], count_nn[:, me]
  from_n = jnp.cumsum(sent_n, dtype=jnp.int32) - sent_n
  if current_device() == "cpu":
    return _standing_in(rows_ND, sent_n, from_n, received_n, num_rows, axis)
  earlier_nn = jnp.cumsum(count_nn, axis=0, dtype=jnp.int32) - count_nn
  blank = room(num_rows, rows_ND, zero=zero)
  pieces = number_of_pieces(rows_ND.shape[0], sent_n.shape[0])
  first_nP, size_nP = cut(sent_n, pieces)
  arrays = (
    (from_n[:, None] + first_nP).reshape(-1),
    size_nP.reshape(-1),
    (earlier_nn[me][:, None] + first_nP).reshape(-1),
    cut(received_n, pieces)[1].reshape(-1),
  )
  rows_ND, blank, *arrays = together(rows_ND, blank, *arrays)
  return lax.ragged_all_to_all(rows_ND, blank, *arrays, axis_name=axis)


def number_of_pieces(num_rows: int, num_parts: int) -> int:
  """Pieces of each part: a power of two; one where a message is one anyway."""
  if current_device() not in GPUS:
    return 1
  most = max(1, min(PIECES, num_rows // (num_parts * _LEAST)))
  return 1 << (most.bit_length() - 1)


def cut(count_n: Array, pieces: int) -> tuple[Array, Array]:
  """i32[n,P] first row and size of the pieces of what each device is sent."""
  step_n1 = -(-count_n[:, None] // pieces)
  first_nP = jnp.minimum(
    jnp.arange(pieces, dtype=jnp.int32) * step_n1, count_n[:, None]
  )
  return first_nP, jnp.minimum(step_n1, count_n[:, None] - first_nP)


def _standing_in(rows_ND, sent_n, from_n, received_n, num_rows, axis) -> Array:
  N, D = rows_ND.shape
  n = sent_n.shape[0]
  place_N = jnp.arange(N, dtype=jnp.int32)
  index_nN = jnp.where(place_N < sent_n[:, None], from_n[:, None] + place_N, N)
  room_nND = lax.all_to_all(take(rows_ND, index_nN), axis, 0, 0, tiled=True)
  end_n = jnp.cumsum(received_n, dtype=jnp.int32)
  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  source_R = jnp.minimum(search(end_n, row_R, "right").astype(jnp.int32), n - 1)
  place_R = row_R - (end_n - received_n)[source_R]
  index_R = jnp.where(row_R < end_n[-1], source_R * N + place_R, n * N)
  return take(room_nND.reshape(n * N, D), index_R)


def _forward(rows_ND, count_nn, num_rows, axis, zero):
  y_RD = _exchange(rows_ND, count_nn, num_rows, axis, zero)
  return y_RD, (count_nn, rows_ND[:, :0])


def _backward(num_rows, axis, zero, residual, grad_RD):
  del num_rows
  count_nn, sent = residual
  return _exchange(grad_RD, count_nn.T, sent.shape[0], axis, zero), None


_exchange.defvjp(_forward, _backward)
