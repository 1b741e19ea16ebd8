"""A gated feed-forward on Hopper, from tokens to weighed rows, with its gradients.

  forward    x rows = tokens in the experts' order
             h_g, h_u = x gate, x up;  a = w f(h_g) h_u       one kernel, three results
             y = a down
  backward   da = dy down^T;  dh_g, dh_u, a, dw = <da, a>/w   one kernel over h_g, h_u
             d down = a^T dy
             x rows again;  d gate, d up
             dx = dh_g gate^T + dh_u up^T                     one kernel, one sum
             dx of tokens = sums of their rows

So `a`, `da` and a second `dx` never make a way to memory and back of their own, `y` is
not kept, and at no time do two arrays [R,D] stand beside the hidden ones.  Kept for the
backward pass are the tokens, h_g and h_u (`keep="hidden"`), the rows too ("rows"), or
only the tokens ("inputs").  The algebra is SonicMoE's (arXiv 2512.14080).
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jmoe.kernels import permute_rows
from jmoe.kernels.grouped_ffn.hopper_kernels import (
  Activation,
  back_kernel,
  hidden_kernel,
)
from jmoe.kernels.grouped_matmul.hopper import foldable, matrices, padded, rows
from jmoe.types import Groups, Layout, pytree, static


@dataclasses.dataclass(frozen=True)
class Form:
  """What is static about a gated feed-forward.

  Args:
    activation: of `activations`.
    keep: what the backward pass finds, of `api.KEEPS`.
    num_sms: multiprocessors to use; None: all.
  """

  activation: Activation
  keep: str = "hidden"
  num_sms: int | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_ffn(
  form: Form,
  x: Array,
  layout: Layout | None,
  gate_EDF: Array,
  up_EDF: Array,
  down_EFD: Array,
  groups: Groups,
  weight_R: Array | None = None,
) -> Array:
  """`weight (f(x gate) (x up)) down`, `[R,D]`; undefined in blocks without rows.

  Args:
    form: what is static.
    x: the tokens [T,D], or without a layout the rows [R,D], padding rows zero; in
      bfloat16 or float16.
    layout: where each token goes, or None.
    gate_EDF, up_EDF, down_EFD: matrices of the same dtype.
    groups: aligned to `hopper.BLOCK`.
    weight_R: f32[R], or None for ones.
  """
  given = _Given(x, layout, gate_EDF, up_EDF, down_EFD, groups, weight_R)
  (a_RF,) = _hidden(form, given, given.rows(), hidden=False, product=True)
  return rows(((a_RF, down_EFD),), groups, num_sms=form.num_sms)


@pytree
class _Given:
  """The arguments that are arrays, or what came of them."""

  x: Any
  layout: Any
  gate_EDF: Any
  up_EDF: Any
  down_EFD: Any
  groups: Any
  weight_R: Any

  def rows(self) -> Array:
    """`[R,D]` in the experts' order."""
    if self.layout is None:
      return self.x
    return permute_rows.spread(self.x, self.layout)


@pytree
class _Kept:
  """What the backward pass finds."""

  given: _Given
  x_RD: Array | None
  hidden: tuple[Array, ...]  # h_g and h_u, [R,F]; none if they are made anew
  learns: bool = static(default=True)  # whether a gradient of the matrices is needed


def _hidden(form: Form, given: _Given, x_RD: Array, **results: bool):
  kernel = functools.partial(
    hidden_kernel, activation=form.activation, num_sms=form.num_sms, **results
  )
  F = given.gate_EDF.shape[2]
  operands = [padded(x_RD, 1), padded(given.gate_EDF, 1, 2), padded(given.up_EDF, 1, 2)]
  if given.weight_R is not None:
    operands.append(given.weight_R)
  return tuple(h[:, :F] for h in foldable(kernel)(given.groups, *operands))


def _forward(form, *primals):
  given = _Given(*jax.tree.map(lambda p: p.value, primals))
  told = _Given(*jax.tree.map(lambda p: p.perturbed, primals))
  x_RD = given.rows()
  keeps_hidden = form.keep != "inputs"
  *hidden, a_RF = _hidden(form, given, x_RD, hidden=keeps_hidden, product=True)
  y_RD = rows(((a_RF, given.down_EFD),), given.groups, num_sms=form.num_sms)
  x_RD = x_RD if form.keep == "rows" and given.layout is not None else None
  learns = told.gate_EDF or told.up_EDF or told.down_EFD
  return y_RD, _Kept(given, x_RD, tuple(hidden), learns=bool(learns))


def _backward(form, kept, dy_RD):
  given, groups = kept.given, kept.given.groups
  if isinstance(dy_RD, SymbolicZero):
    zero: Any = dy_RD
    dy_RD = jnp.zeros(zero.shape, zero.dtype)
  hidden = kept.hidden or _hidden(form, given, given.rows(), hidden=True, product=False)
  kernel = functools.partial(
    back_kernel, activation=form.activation, num_sms=form.num_sms
  )
  operands = [padded(dy_RD, 1), padded(given.down_EFD, 1, 2)]
  operands += [padded(h, 1) for h in hidden]
  if given.weight_R is not None:
    operands.append(given.weight_R)
  F = given.gate_EDF.shape[2]
  dg_RF, du_RF, a_RF, *d_weight = foldable(kernel)(groups, *operands)
  dg_RF, du_RF, a_RF = (h[:, :F] for h in (dg_RF, du_RF, a_RF))
  d_matrices = None, None, None
  if kept.learns:
    of = functools.partial(matrices, groups=groups, num_sms=form.num_sms)
    d_down = of(a_RF, dy_RD)
    x_RD = kept.x_RD
    if x_RD is None:
      # Not before `dy` and `a` are done with: two arrays fewer at the same time.
      x, _ = lax.optimization_barrier((given.x, d_down))
      x_RD = dataclasses.replace(given, x=x).rows()
    d_matrices = of(x_RD, dg_RF), of(x_RD, du_RF), d_down
    (dg_RF, du_RF), _ = lax.optimization_barrier(((dg_RF, du_RF), d_matrices))
  pairs = ((dg_RF, given.gate_EDF), (du_RF, given.up_EDF))
  dx = rows(pairs, groups, transpose=True, num_sms=form.num_sms)
  if given.layout is not None:
    dx = permute_rows.summed(dx, given.layout).astype(dx.dtype)
  return dx, None, *d_matrices, None, *(d_weight or (None,))


gated_ffn.defvjp(_forward, _backward, symbolic_zeros=True)
