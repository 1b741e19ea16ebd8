"""A feed-forward on Hopper, from tokens to weighed rows, with its gradients.

  forward    x rows = tokens in the experts' order
             h_n = x w_n + b_n;  a = w f(h_0) h_1             one kernel, its results
             y = a down + w c
  backward   da = dy down^T;  dh_n, a, dw = <da, a> / w       one kernel over the h_n
             d down = a^T dy
             x rows again;  d w_n = x^T dh_n
             dx = sum of dh_n w_n^T                           one kernel, one sum
             dx of tokens = sums of their rows

So `a`, `da` and a second `dx` never make a way to memory and back of their own, `y` is
not kept, and at no time do two arrays [R,D] stand beside the hidden ones.  Kept for the
backward pass are the tokens and the h_n (`keep="hidden"`), the rows too ("rows"), or
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

from jmoe.keeping import named
from jmoe.kernels import permute_rows
from jmoe.kernels.folding import foldable
from jmoe.kernels.grouped_ffn.hopper_kernels import (
  Activation,
  back_kernel,
  hidden_kernel,
)
from jmoe.kernels.grouped_ffn.reference import Matrix
from jmoe.kernels.grouped_matmul.hopper import matrices, padded, rows
from jmoe.kernels.hopper import BLOCK
from jmoe.kernels.row_blocks import expert_of_rows, sums
from jmoe.types import Groups, Layout, pytree, static


@dataclasses.dataclass(frozen=True)
class Form:
  """What is static about a feed-forward.

  Args:
    activation: of `activations`; of the first hidden array, which the second one, if
      there is one, is multiplied with.
    keep: what the backward pass finds, of `api.KEEPS`.
    num_sms: multiprocessors to use; None: all.
  """

  activation: Activation
  keep: str = "hidden"
  num_sms: int | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_ffn(
  form: Form,
  x: Array,
  layout: Layout | None,
  ups: tuple[Matrix, ...],
  down: Matrix,
  groups: Groups,
  weight_R: Array | None = None,
) -> Array:
  """`weight (f(h_0) h_1 down + c)`, `[R,D]`; undefined in blocks without rows.

  Args:
    form: what is static.
    x: the tokens [T,D], or without a layout the rows [R,D], padding rows zero; in
      bfloat16 or float16.
    layout: where each token goes, or None.
    ups: one or two matrices [E,D,F], each with a bias [E,F] or None, of x's dtype.
    down: matrix [E,F,D] with a bias [E,D] or None.
    groups: aligned to `hopper.BLOCK`.
    weight_R: f32[R], or None for ones.
  """
  given = _Given(x, layout, ups, down, groups, weight_R)
  (a_RF,) = _hidden(form, given, given.rows(), hidden=False, product=True)
  return _out(form, given, a_RF)


@pytree
class _Given:
  """The arguments that are arrays, or what came of them."""

  x: Any
  layout: Any
  ups: Any
  down: Any
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
  hidden: tuple[Array, ...]  # [R,F]; none if they are made anew
  # Whether the gradient of a matrix, and of its bias, is needed: of each in turn.
  ups_learn: tuple[tuple[bool, bool], ...] = static(default=())
  down_learns: tuple[bool, bool] = static(default=(True, True))


def _hidden(form: Form, given: _Given, x_RD: Array, **results: bool):
  """What is asked for of the hidden arrays and the activation."""
  biased = any(bias is not None for _, bias in given.ups)
  kernel = functools.partial(
    hidden_kernel,
    ups=len(given.ups),
    biased=biased,
    activation=form.activation,
    num_sms=form.num_sms,
    **results,
  )
  F = given.ups[0][0].shape[2]
  operands = [padded(x_RD, 1), *(padded(w, 1, 2) for w, _ in given.ups)]
  if biased:
    none = jnp.zeros((given.ups[0][0].shape[0], F), x_RD.dtype)
    operands += [padded(none if b is None else b, 1) for _, b in given.ups]
  if given.weight_R is not None:
    operands.append(given.weight_R)
  return tuple(h[:, :F] for h in foldable(kernel)(given.groups, *operands))


def _out(form: Form, given: _Given, a_RF: Array) -> Array:
  w_EFD, c_ED = given.down
  of = functools.partial(rows, num_sms=form.num_sms)
  return of(((a_RF, w_EFD),), given.groups, c_ED, given.weight_R)


def _forward(form, *primals):
  given = _Given(*jax.tree.map(lambda p: p.value, primals))
  told = _Given(*jax.tree.map(lambda p: p.perturbed, primals))
  x_RD = given.rows()
  keeps_hidden = form.keep != "inputs"
  *hidden, a_RF = _hidden(form, given, x_RD, hidden=keeps_hidden, product=True)
  hidden = named(tuple(hidden), "hidden")
  *ups, down = ((bool(w), bool(bias)) for w, bias in (*told.ups, told.down))
  read = form.keep == "rows" and given.layout is not None and any(w for w, _ in ups)
  kept = _Kept(
    given, x_RD if read else None, hidden, ups_learn=tuple(ups), down_learns=down
  )
  return _out(form, given, a_RF), kept


def _backward(form, kept, dy_RD):
  given, groups = kept.given, kept.given.groups
  if isinstance(dy_RD, SymbolicZero):
    zero: Any = dy_RD
    dy_RD = jnp.zeros(zero.shape, zero.dtype)
  hidden = kept.hidden
  if not hidden:
    # After the forward pass, whose own rows it would be otherwise.
    x, dy_RD = lax.optimization_barrier((given.x, dy_RD))
    again = dataclasses.replace(given, x=x).rows()
    hidden = _hidden(form, given, again, hidden=True, product=False)
  kernel = functools.partial(
    back_kernel, ups=len(hidden), activation=form.activation, num_sms=form.num_sms
  )
  operands = [padded(dy_RD, 1), padded(given.down[0], 1, 2)]
  operands += [padded(h, 1) for h in hidden]
  if given.weight_R is not None:
    operands.append(given.weight_R)
  found = foldable(kernel)(groups, *operands)
  cut = slice(given.down[0].shape[1])
  dhs_RF = tuple(h[:, cut] for h in found[: len(hidden)])
  a_RF = found[len(hidden)][:, cut]
  d_weight = _of_weight(given, dy_RD, found[len(hidden) + 1 :])
  of = functools.partial(matrices, groups=groups, num_sms=form.num_sms)
  d_down = (
    of(a_RF, dy_RD) if kept.down_learns[0] else None,
    _of_bias(given.down[1], kept.down_learns[1], dy_RD, groups, given.weight_R),
  )
  x_RD = kept.x_RD
  if x_RD is None and any(w for w, _ in kept.ups_learn):
    # Not before `dy` and `a` are done with: two arrays fewer at the same time.
    before = dhs_RF[0] if d_down[0] is None else d_down[0]
    x, _ = lax.optimization_barrier((given.x, before))
    x_RD = dataclasses.replace(given, x=x).rows()
  d_ups = tuple(
    (
      of(x_RD, dh_RF) if x_RD is not None and learn[0] else None,
      _of_bias(bias, learn[1], dh_RF, groups),
    )
    for dh_RF, (_, bias), learn in zip(dhs_RF, given.ups, kept.ups_learn, strict=True)
  )
  made = [d_w for d_w, _ in d_ups if d_w is not None]
  if made:
    dhs_RF, _ = lax.optimization_barrier((dhs_RF, made))
  pairs = [(dh_RF, w) for dh_RF, (w, _) in zip(dhs_RF, given.ups, strict=True)]
  dx = rows(pairs, groups, transpose=True, num_sms=form.num_sms)
  if given.layout is not None:
    dx = permute_rows.summed(dx, given.layout).astype(dx.dtype)
  return dx, None, d_ups, d_down, None, d_weight


def _of_weight(given: _Given, dy_RD: Array, dots: tuple[Array, ...]) -> Array | None:
  """`<da, a> + <dy, c>`, f32[R]."""
  c_ED = given.down[1]
  if not dots or c_ED is None:
    return dots[0] if dots else None
  c_RD = c_ED[expert_of_rows(given.groups, dy_RD.shape[0], BLOCK)].astype(jnp.float32)
  return dots[0] + jnp.sum(dy_RD.astype(jnp.float32) * c_RD, axis=1)


def _of_bias(
  bias_EF: Array | None,
  learns: bool,
  dy_RF: Array,
  groups: Groups,
  weight_R: Array | None = None,
) -> Array | None:
  if bias_EF is None or not learns:
    return None
  if weight_R is not None:
    dy_RF = dy_RF.astype(jnp.float32) * weight_R[:, None]
  return sums(dy_RF, groups, BLOCK).astype(bias_EF.dtype)


fused_ffn.defvjp(_forward, _backward, symbolic_zeros=True)
