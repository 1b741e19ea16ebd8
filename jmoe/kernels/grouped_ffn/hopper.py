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

Rows may lie in several buffers, those first that are there first.  Then h of one is
made while the rows of the next come, y of the last one first, so that it leaves while
others are made; and backwards the same.  Each d w is one product over all of them.

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
from jmoe.kernels.grouped_ffn.hopper_gradients import of_ups, of_x, through_down
from jmoe.kernels.grouped_ffn.hopper_kernels import hidden_kernel
from jmoe.kernels.grouped_ffn.hopper_values import Buffer, Form, Given, Kept
from jmoe.kernels.grouped_ffn.reference import Matrix
from jmoe.kernels.grouped_matmul.hopper import padded, rows
from jmoe.kernels.hopper import BLOCK
from jmoe.kernels.pieces import after, columns, parts, put


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_ffn(
  form: Form,
  buffers: tuple[Buffer, ...],
  ups: tuple[Matrix, ...],
  down: Matrix,
) -> tuple[Array, ...]:
  """`weight (f(h_0) h_1 down + c)`, `[R,D]` of each buffer.

  Undefined in blocks without rows.  With `form.sums` the sums of each token's rows,
  `[T,D]`.  Hidden rows are made in the order of the buffers, what comes out of them in
  the other one, and each matrix's gradient once, over all buffers: see above.

  Args:
    form: what is static.
    buffers: rows in bfloat16 or float16.
    ups: one or two matrices [E,D,F], each with a bias [E,F] or None, of their dtype.
    down: matrix [E,F,D] with a bias [E,D] or None.
  """
  given = [_given(buffer, ups, down) for buffer in buffers]
  products = [a_RF for (a_RF,) in _in_turn(form, given, hidden=False, product=True)]
  return _outs(form, given, products)


def _given(buffer: Buffer, ups: Any, down: Any) -> Given:
  return Given(buffer.x, buffer.layout, buffer.groups, buffer.weight_R, ups, down)


def _in_turn(
  form: Form, given: Sequence[Given], rows: Sequence[Any] = (), **results: bool
) -> list[tuple[Any, ...]]:
  """`_hidden` of each buffer, none of which is read before that of the one before."""
  found: list[tuple[Any, ...]] = []
  for n, one in enumerate(given):
    x_RD = rows[n] if rows else None
    if found:
      found[-1], (x, x_RD) = after(found[-1], (one.x, x_RD))
      one = dataclasses.replace(one, x=x)
    found.append(_hidden(form, one, x_RD, **results))
  return found


def _outs(
  form: Form, given: Sequence[Given], products: Sequence[Array]
) -> tuple[Array, ...]:
  """`_out` of each buffer, the last one's first: that may have a way to go."""
  found: list[Array] = []
  for one, a_RF in zip(reversed(given), reversed(products), strict=True):
    if found:
      found[-1], a_RF = after(found[-1], a_RF)
    found.append(_out(form, one, a_RF))
  return tuple(reversed(found))


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
    x_SD = permute_rows.spread(x, part.layout(given.layout), block=BLOCK)
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
  buffers, ups, down = jax.tree.map(lambda p: p.value, primals)
  *_, ups_told, down_told = jax.tree.map(lambda p: p.perturbed, primals)
  given = [_given(buffer, ups, down) for buffer in buffers]
  rows: list[Any] = []
  if form.keep == "rows" and given[0].layout is not None:
    rows = [one.rows() for one in given]
  keeps = form.keep != "inputs"
  found = _in_turn(form, given, rows, hidden=keeps, product=True)
  hidden = named(tuple(tuple(all_but_last) for *all_but_last, _ in found), "hidden")
  *ups, down = ((bool(w), bool(bias)) for w, bias in (*ups_told, down_told))
  kept = Kept(
    tuple(given),
    tuple(rows) if any(w for w, _ in ups) else (),
    hidden,
    ups_learn=tuple(ups),
    down_learns=down,
  )
  return _outs(form, given, [last for *_, last in found]), kept


def _backward(form, kept, dys):
  given, hidden = list(kept.given), list(kept.hidden)
  dys = list(map(_materialised, dys))
  if form.keep == "inputs":
    # After the forward pass, whose own rows it would be otherwise, but not after `dy`
    # of others that are still on their way.
    for n, one in enumerate(given):
      dys[0], x = after(dys[0], one.x)
      again = dataclasses.replace(one, x=x)
      found = _hidden(form, again, hidden=True, product=False)
      hidden[n], dys[n] = after(found, dys[n])
  if form.travels:
    return _beside_exchanges(form, kept, hidden, dys)
  dhs, d_weights, d_down = through_down(form, kept, hidden, dys)
  d_ups, dhs = of_ups(form, kept, dhs, d_down[0])
  dxs = [of_x(form, one, dh) for one, dh in zip(given, dhs, strict=True)]
  return _gradients(dxs, d_weights), d_ups, d_down


def _materialised(dy: Any) -> Array:
  zero: Any = dy
  return jnp.zeros(zero.shape, zero.dtype) if isinstance(dy, SymbolicZero) else dy


def _beside_exchanges(form: Form, kept: Kept, hidden: Sequence[Any], dys: Sequence):
  """The gradients, those of the matrices made while others travel.

  Rows of x are gathered while `dy` comes, which costs room for both, unless a buffer
  whose `dy` is there can be worked on meanwhile; and what goes home is made first: then
  nothing waits for an exchange but what needs it.
  """
  given = kept.given
  alone = len(given) == 1 and form.sums and not kept.rows
  if alone and any(w for w, _ in kept.ups_learn):
    (one,), (of_one,), (dy,) = given, hidden, dys
    # After the forward pass, whose own rows it would be otherwise, but before `dy`.
    of_one, x = after(of_one, one.x)
    x_RD, dy = after(dataclasses.replace(one, x=x).rows(), dy)
    hidden, dys = [of_one], [dy]
    kept = dataclasses.replace(kept, rows=(x_RD,))
  dhs, d_weights, d_down = through_down(form, kept, hidden, dys)
  _, dhs = after(d_down, dhs)  # what went into `down` is done with
  dxs: list[Array] = []
  for one, dh in zip(reversed(given), reversed(dhs), strict=True):
    if dxs:
      dxs[-1], dh = after(dxs[-1], dh)
    dxs.append(of_x(form, one, dh))
  dxs.reverse()
  _, dhs, xs = after(dxs, dhs, [one.x for one in given])
  again = [dataclasses.replace(one, x=x) for one, x in zip(given, xs, strict=True)]
  kept = dataclasses.replace(kept, given=tuple(again))
  d_ups, _ = of_ups(form, kept, dhs, d_down[0])
  return _gradients(dxs, d_weights), d_ups, d_down


def _gradients(dxs: Sequence[Array], d_weights: Sequence[Any]) -> tuple[Any, ...]:
  """Those of the buffers."""
  pairs = zip(dxs, d_weights, strict=True)
  return tuple(Buffer(dx, None, None, d_weight) for dx, d_weight in pairs)


fused_ffn.defvjp(_forward, _backward, symbolic_zeros=True)
