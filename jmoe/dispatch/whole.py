"""A gated layer on one device as one function: out, through the experts, and home.

  forward    x_RD -> h_g, h_u, a -> y_RD -> y_TD
  backward   dy_RD = w dy_TD out again;  dh_g, dh_u, a;  dx_RD -> dx_TD;  x_RD out again

Kept are the tokens and the two hidden arrays; neither rows that went out nor those that
came back.  The gradient of a weight needs no output: `<dy, a down> = <dy down^T, a>`,
and as `a = f(h_g) h_u` that is `<dh_u, h_u> / w`, where dh_u has the factor w.
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.dispatch.carry import sum_home
from jmoe.keeping import named
from jmoe.kernels import permute_rows
from jmoe.kernels.grouped_ffn import hopper
from jmoe.kernels.permute_rows.reference import take
from jmoe.types import Layout, wide

# Of a weight: below it the factor is this one, so that it can be divided by.
_LEAST = 2.0**-40


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(
  activation: hopper.Activation,
  x_TD: Array,
  weight_N: Array,
  gate_EDF: Array,
  up_EDF: Array,
  down_EFD: Array,
  layout: Layout,
) -> Array:
  """`[T,D]`: the weighted sum of each token's experts, on Hopper's kernels.

  Args:
    activation: of `kernels.grouped_ffn.activations`.
    x_TD: tokens, in bfloat16 or float16.
    weight_N: f32[N] of each assignment, zero for dropped ones.
    gate_EDF, up_EDF, down_EFD: matrices of the same dtype.
    layout: aligned to Hopper's blocks.
  """
  return _forward(activation, x_TD, weight_N, gate_EDF, up_EDF, down_EFD, layout)[0]


def _forward(activation, x_TD, weight_N, gate_EDF, up_EDF, down_EFD, layout):
  x_RD = permute_rows.take(x_TD, layout.token)
  y_RD, g_RF, u_RF = hopper.forward(
    activation, x_RD, gate_EDF, up_EDF, down_EFD, layout.groups
  )
  y_TD = sum_home(y_RD, weight_N, layout).astype(x_TD.dtype)
  hidden = named((g_RF, u_RF), "hidden")
  return y_TD, (x_TD, weight_N, hidden, gate_EDF, up_EDF, down_EFD, layout)


def _backward(activation, residual, dy_TD):
  x_TD, weight_N, (g_RF, u_RF), gate_EDF, up_EDF, down_EFD, layout = residual
  weight_R = take(weight_N, layout.entry)
  # A weight of zero has a gradient all the same.
  weight_R = jnp.where(jnp.abs(weight_R) < _LEAST, _LEAST, weight_R)
  dy_RD = permute_rows.scaled(dy_TD, layout.token, weight_R)
  x_RD = permute_rows.take(x_TD, layout.token)
  matrices = gate_EDF, up_EDF, down_EFD
  dx_RD, grads, du_RF = hopper.backward(
    activation, x_RD, g_RF, u_RF, *matrices, layout.groups, dy_RD
  )
  # Rows that no assignment owns may hold anything; nothing points at them.
  sums = wide(u_RF)
  dot_R = jnp.sum(u_RF.astype(sums) * du_RF.astype(sums), axis=1) / weight_R
  dweight_N = take(dot_R, layout.row).astype(weight_N.dtype)
  dx_TD = sum_home(dx_RD, None, layout).astype(x_TD.dtype)
  return dx_TD, dweight_N, *grads, None


gated.defvjp(_forward, _backward)
