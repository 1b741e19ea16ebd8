"""A feed-forward on Hopper, from tokens to weighed rows, with its gradients.

  forward    x rows = tokens in the experts' order
             h_n = x w_n + b_n;  a = w f(h_0) h_1             one kernel, its results
             y = a down + w c
  backward   da = dy down^T;  dh_n, a, dw = <da, a> / w       one kernel over the h_n
             d down = a^T dy
             x rows again;  d w_n = x^T dh_n
             dx = sum of dh_n w_n^T                           one kernel, one sum
             dx of tokens = sums of their rows

Where x has come from other devices, and its gradient goes back to them, x rows are made
again first of all and dx before the d w_n, so that exchanges run beside products.

So `a`, `da` and a second `dx` never make a way to memory and back of their own, `y` is
not kept, and at no time do two arrays [R,D] stand beside the hidden ones.  Kept for the
backward pass are the tokens and the h_n (`keep="hidden"`), the rows too ("rows"), or
only the tokens ("inputs").  The algebra is SonicMoE's (arXiv 2512.14080).

In pieces (`Form.pieces`) the large arrays of both peaks are not there as a whole:

  x rows into h_n and `a`  some rows after the others; results are written in place
  y and its sums           some columns after the others
  `a` and d down           some columns of `a`, which are rows of the gradient

so that nothing is read twice but the tokens, in the first line.  Whole are the rows of
`dy`: `da` needs every column of them, and d down every row; and in the end, when `a` is
gone, those of x and dx.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jmoe.keeping import named
from jmoe.kernels import permute_rows
from jmoe.kernels.folding import foldable
from jmoe.kernels.grouped_ffn.hopper_kernels import back_kernel, hidden_kernel
from jmoe.kernels.grouped_ffn.hopper_values import Form, Given, Kept
from jmoe.kernels.grouped_ffn.reference import Matrix
from jmoe.kernels.grouped_matmul.hopper import matrices, padded, rows
from jmoe.kernels.hopper import BLOCK
from jmoe.kernels.pieces import after, columns, parts, put
from jmoe.kernels.row_blocks import expert_of_rows, sums
from jmoe.types import Groups, Layout


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

  With `form.sums` the sums of each token's rows, `[T,D]`.

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
  given = Given(x, layout, ups, down, groups, weight_R)
  (a_RF,) = _hidden(form, given, hidden=False, product=True)
  return _out(form, given, a_RF)


def _hidden(
  form: Form, given: Given, x_RD: Array | None = None, **results: bool
) -> tuple[Any, ...]:
  """What is asked for of the hidden arrays and the activation, part by part.

  A part's rows are gathered when those of the part before are done with; but `x_RD`,
  if they are there, are taken as they are.
  """
  biased = any(bias is not None for _, bias in given.ups)
  kernel = functools.partial(
    hidden_kernel,
    ups=len(given.ups),
    biased=biased,
    activation=form.activation,
    num_sms=form.num_sms,
    **results,
  )
  E, _, F = given.ups[0][0].shape
  operands = [padded(w, 1, 2) for w, _ in given.ups]
  if biased:
    none = jnp.zeros((E, F), given.x.dtype)
    operands += [padded(none if b is None else b, 1) for _, b in given.ups]
  if given.weight_R is not None:
    operands.append(given.weight_R)
  if x_RD is not None or form.pieces == 1:
    x_RD = given.rows() if x_RD is None else x_RD
    found = foldable(kernel)(given.groups, padded(x_RD, 1), *operands)
    return tuple(h[:, :F] for h in found)
  found: tuple[Any, ...] = ()
  for part in parts(given.layout.num_rows, form.pieces, BLOCK):
    found, x = after(found, given.x)
    x_SD = permute_rows.spread(x, part.layout(given.layout))
    of_part = functools.partial(kernel, part=part, made=len(found))
    found = foldable(of_part)(part.groups(given.groups), x_SD, *operands, *found)
  return tuple(found)


def _out(form: Form, given: Given, a_RF: Array) -> Array:
  """The rows, or with `form.sums` the tokens.

  In pieces: some columns of the rows are made when those before are summed.
  """
  w_EFD, c_ED = given.down
  of = functools.partial(rows, num_sms=form.num_sms)
  if not form.sums:
    return of(((a_RF, w_EFD),), given.groups, c_ED, given.weight_R)
  y_TD = None
  for at in columns(w_EFD.shape[2], form.pieces):
    y_TD, a_RF = after(y_TD, a_RF)
    y_RC = of(((a_RF, w_EFD),), given.groups, c_ED, given.weight_R, columns=at)
    y_TC = permute_rows.summed(y_RC, given.layout).astype(y_RC.dtype)
    y_TD = put(y_TD, y_TC, at)
  assert y_TD is not None
  return y_TD


def _forward(form, *primals):
  given = Given(*jax.tree.map(lambda p: p.value, primals))
  told = Given(*jax.tree.map(lambda p: p.perturbed, primals))
  x_RD = None
  if form.keep == "rows" and given.layout is not None:
    x_RD = given.rows()
  keeps_hidden = form.keep != "inputs"
  *hidden, a_RF = _hidden(form, given, x_RD, hidden=keeps_hidden, product=True)
  hidden = named(tuple(hidden), "hidden")
  *ups, down = ((bool(w), bool(bias)) for w, bias in (*told.ups, told.down))
  kept = Kept(
    given,
    x_RD if any(w for w, _ in ups) else None,
    hidden,
    ups_learn=tuple(ups),
    down_learns=down,
  )
  return _out(form, given, a_RF), kept


def _backward(form, kept, dy):
  given = kept.given
  if isinstance(dy, SymbolicZero):
    zero: Any = dy
    dy = jnp.zeros(zero.shape, zero.dtype)
  hidden = kept.hidden
  if not hidden:
    # After the forward pass, whose own rows it would be otherwise.
    dy, x = after(dy, given.x)
    again = dataclasses.replace(given, x=x)
    hidden, dy = after(_hidden(form, again, hidden=True, product=False), dy)
  dy_RD = permute_rows.spread(dy, given.layout) if form.sums else dy
  if form.travels:
    return _beside_exchanges(form, kept, hidden, dy_RD)
  dhs_RF, d_weight, d_down = _through_down(form, kept, hidden, dy_RD)
  d_ups, dhs_RF = _of_ups(form, kept, dhs_RF, d_down[0])
  dx = _of_x(form, given, dhs_RF)
  return dx, None, d_ups, d_down, None, d_weight


def _beside_exchanges(form: Form, kept: Kept, hidden: Sequence[Array], dy_RD: Array):
  """The gradients, those of the matrices made while others travel.

  Rows of x are gathered while `dy` comes, which costs room for both, and what goes home
  is made first: then nothing waits for an exchange but what needs it.
  """
  given = kept.given
  if form.sums and kept.x_RD is None and any(w for w, _ in kept.ups_learn):
    # After the forward pass, whose own rows it would be otherwise, but before `dy`.
    hidden, x = after(hidden, given.x)
    x_RD, dy_RD = after(dataclasses.replace(given, x=x).rows(), dy_RD)
    kept = dataclasses.replace(kept, x_RD=x_RD)
  dhs_RF, d_weight, d_down = _through_down(form, kept, hidden, dy_RD)
  _, dhs_RF = after(d_down, dhs_RF)  # `a` is done with
  dx = _of_x(form, given, dhs_RF)
  _, dhs_RF, x = after(dx, dhs_RF, given.x)
  kept = dataclasses.replace(kept, given=dataclasses.replace(given, x=x))
  d_ups, _ = _of_ups(form, kept, dhs_RF, d_down[0])
  return dx, None, d_ups, d_down, None, d_weight


def _of_x(form: Form, given: Given, dhs_RF: Sequence[Array]) -> Array:
  """The gradient of the rows, or of the tokens: sums of their rows."""
  pairs = [(dh_RF, w) for dh_RF, (w, _) in zip(dhs_RF, given.ups, strict=True)]
  dx = rows(pairs, given.groups, transpose=True, num_sms=form.num_sms)
  if given.layout is None:
    return dx
  return permute_rows.summed(dx, given.layout).astype(dx.dtype)


def _through_down(form: Form, kept: Kept, hidden: Sequence[Array], dy_RD: Array):
  """(gradients of the hidden arrays, of the weight, of `down`).

  In pieces: some columns of what went into `down` are made when those of the piece
  before have become rows of its gradient.
  """
  given, groups = kept.given, kept.given.groups
  ups, F = len(hidden), given.down[0].shape[1]
  kernel = functools.partial(
    back_kernel, ups=ups, activation=form.activation, num_sms=form.num_sms
  )
  dy_padded, down = padded(dy_RD, 1), padded(given.down[0], 1, 2)
  weight = () if given.weight_R is None else (given.weight_R,)
  hidden = [padded(h, 1) for h in hidden]
  dots, d_matrix = [], None
  learns, bias_learns = kept.down_learns
  pieces = form.pieces if learns else 1
  if pieces > 1 and F >= 1024:
    pieces += 1  # so wide, `a` is what is largest beside the rows of `dy`
  for at in columns(down.shape[1], pieces, tile=BLOCK):
    d_matrix, hidden = after(d_matrix, hidden)
    of_columns = foldable(functools.partial(kernel, columns=at))
    found = of_columns(groups, dy_padded, down, *hidden, *weight)
    hidden, a_RC, dots = found[:ups], found[ups], [*dots, *found[ups + 1 :]]
    if learns:
      d_matrix = matrices(
        a_RC[:, :F], dy_RD, groups, num_sms=form.num_sms, columns=at, into=d_matrix
      )
  d_bias = _of_bias(given.down[1], bias_learns, dy_RD, groups, given.weight_R)
  d_weight = _of_weight(given, dy_RD, dots)
  return tuple(h[:, :F] for h in hidden), d_weight, (d_matrix, d_bias)


def _of_ups(form: Form, kept: Kept, dhs_RF: tuple[Array, ...], d_down: Array | None):
  """(gradients of the matrices `ups` and their biases, those of the hidden arrays)."""
  given, groups = kept.given, kept.given.groups
  x_RD = kept.x_RD
  if x_RD is None and any(w for w, _ in kept.ups_learn):
    # Not before `dy` and `a` are done with: two arrays fewer at the same time.
    _, x = after(dhs_RF[0] if d_down is None else d_down, given.x)
    x_RD = dataclasses.replace(given, x=x).rows()
  of = functools.partial(matrices, groups=groups, num_sms=form.num_sms)
  d_ups = tuple(
    (
      of(x_RD, dh_RF) if x_RD is not None and learn[0] else None,
      _of_bias(bias, learn[1], dh_RF, groups),
    )
    for dh_RF, (_, bias), learn in zip(dhs_RF, given.ups, kept.ups_learn, strict=True)
  )
  made = [d_matrix for d_matrix, _ in d_ups if d_matrix is not None]
  if made:
    dhs_RF, _ = after(dhs_RF, made)
  return d_ups, dhs_RF


def _of_weight(given: Given, dy_RD: Array, dots: list[Array]) -> Array | None:
  """`<da, a> + <dy, c>`, f32[R]."""
  c_ED = given.down[1]
  if not dots:
    return None
  dot_R = functools.reduce(jnp.add, dots)
  if c_ED is None:
    return dot_R
  c_RD = c_ED[expert_of_rows(given.groups, dy_RD.shape[0], BLOCK)].astype(jnp.float32)
  return dot_R + jnp.sum(dy_RD.astype(jnp.float32) * c_RD, axis=1)


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
