"""Grouped matmul in plain jax: the backend of CPUs, and the portable one."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.loops import (
  dot,
  over_chunks,
  over_experts,
  read,
  write,
  write_expert,
)
from jmoe.kernels.varying import zeros
from jmoe.types import Groups, wide


@jax.custom_vjp
def blocks(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  """`y_r = x_r w_e(r) + bias_e(r)`; zero in the unused tail."""
  return _rows(x_RD, w_EDF, groups, bias_EF, contract=1)


def _rows(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None, contract: int
) -> Array:
  """Rows times matrices, contracted over the matrices' dimension `contract`."""
  R, F = x_RD.shape[0], w_EDF.shape[3 - contract]

  def of_expert(e, y_RF):
    w = w_EDF[e]
    bias = None if bias_EF is None else bias_EF[e].astype(wide(x_RD))

    def chunk(row, size, y_RF):
      y = dot(read(x_RD, row, size), w, 1, contract - 1)
      return write(y_RF, y if bias is None else y + bias, row)

    return over_chunks(groups, e, R, chunk, y_RF)

  return over_experts(groups, of_expert, zeros((R, F), x_RD.dtype, x_RD))


def _matrices(x_RD: Array, y_RF: Array, groups: Groups, like: Array, bias: bool):
  """Gradients of the matrices, and of the biases if there are any."""
  R, D, F = *x_RD.shape, y_RF.shape[1]

  def of_expert(e, grads):
    def chunk(row, size, own):
      x, y = read(x_RD, row, size), read(y_RF, row, size)
      dw = own[0] + dot(x, y, 0, 0)
      if not bias:
        return (dw,)
      real = row + jnp.arange(size, dtype=jnp.int32) < groups.start[e] + groups.rows[e]
      return dw, own[1] + jnp.sum(
        jnp.where(real[:, None], y, 0).astype(wide(y)), axis=0
      )

    own = (zeros((D, F), wide(x_RD), x_RD),)
    own += (zeros((F,), wide(x_RD), x_RD),) if bias else ()
    own = over_chunks(groups, e, R, chunk, own)
    return tuple(write_expert(g, o, e) for g, o in zip(grads, own, strict=True))

  E = like.shape[0]
  grads = (zeros((E, D, F), like.dtype, x_RD),)
  grads += (zeros((E, F), like.dtype, x_RD),) if bias else ()
  return over_experts(groups, of_expert, grads)


def _forward(x_RD, w_EDF, groups, bias_EF):
  return blocks(x_RD, w_EDF, groups, bias_EF), (x_RD, w_EDF, groups, bias_EF)


def _backward(residual, grad_RF):
  x_RD, w_EDF, groups, bias_EF = residual
  d_x = _rows(grad_RF, w_EDF, groups, None, contract=2).astype(x_RD.dtype)
  d_w, *d_bias = _matrices(x_RD, grad_RF, groups, w_EDF, bias_EF is not None)
  return d_x, d_w, None, d_bias[0].astype(bias_EF.dtype) if d_bias else None


blocks.defvjp(_forward, _backward)
