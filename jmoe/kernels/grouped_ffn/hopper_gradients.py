"""The gradients of a feed-forward on Hopper: what `hopper.py` puts in order.

A matrix's gradient is one product over the rows of all buffers.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jmoe.kernels import permute_rows
from jmoe.kernels.folding import foldable
from jmoe.kernels.grouped_ffn.hopper_kernels import back_kernel
from jmoe.kernels.grouped_ffn.hopper_values import Form, Given, Kept
from jmoe.kernels.grouped_matmul.hopper import matrices, padded, rows
from jmoe.kernels.hopper import BLOCK
from jmoe.kernels.pieces import after, columns
from jmoe.kernels.row_blocks import expert_of_rows, sums


def of_x(form: Form, given: Given, dhs_RF: Sequence[Array]) -> Array:
  """The gradient of the rows, or of the tokens: sums of their rows."""
  pairs = [(dh_RF, w) for dh_RF, (w, _) in zip(dhs_RF, given.ups, strict=True)]
  dx = rows(pairs, given.groups, transpose=True, num_sms=form.num_sms)
  if given.layout is None:
    return dx
  return permute_rows.summed(dx, given.layout).astype(dx.dtype)


def through_down(form: Form, kept: Kept, hidden: Sequence[Any], dys: Sequence[Array]):
  """(gradients of the hidden arrays, of the weights, of `down`).

  In pieces: some columns of what went into `down` are made when those of the piece
  before have become rows of its gradient.
  """
  given = kept.given
  weights, bias = given[0].down
  ups, F = len(given[0].ups), weights.shape[1]
  kernel = functools.partial(
    back_kernel, ups=ups, activation=form.activation, num_sms=form.num_sms
  )
  down = padded(weights, 1, 2)
  made: list[Any] = [[padded(h, 1) for h in of_one] for of_one in hidden]
  dots: list[list[Array]] = [[] for _ in given]
  rows_dy: list[Array] = []
  d_matrix = None
  learns, bias_learns = kept.down_learns
  pieces = form.pieces if learns else 1
  if pieces > 1 and F >= 1024:
    pieces += 1  # so wide, `a` is what is largest beside the rows of `dy`
  for at in columns(down.shape[1], pieces, tile=BLOCK):
    d_matrix, made = after(d_matrix, made)
    of_columns = foldable(functools.partial(kernel, columns=at))
    products: list[Array] = []
    for n, one in enumerate(given):
      if n == len(rows_dy):  # not before it is its turn: it may not have come yet
        dy = dys[n]
        if n:
          (*before, products[-1]), dy = after((*made[n - 1], products[-1]), dy)
          made[n - 1] = before
        if form.sums:
          dy = permute_rows.spread(dy, one.layout, block=BLOCK)
        rows_dy.append(dy)
      weight = () if one.weight_R is None else (one.weight_R,)
      found = of_columns(one.groups, padded(rows_dy[n], 1), down, *made[n], *weight)
      made[n], a_RC = list(found[:ups]), found[ups]
      products.append(a_RC)
      dots[n] += found[ups + 1 :]
    if learns:
      d_matrix = matrices(
        [a_RC[:, :F] for a_RC in products],
        rows_dy,
        [one.groups for one in given],
        num_sms=form.num_sms,
        columns=at,
        into=d_matrix,
      )
  d_bias = _of_bias(bias, bias_learns, rows_dy, given, weighs=True)
  d_weights = [
    _of_weight(one, dy_RD, dot)
    for one, dy_RD, dot in zip(given, rows_dy, dots, strict=True)
  ]
  dhs = [tuple(h[:, :F] for h in of_one) for of_one in made]
  return dhs, d_weights, (d_matrix, d_bias)


def of_ups(form: Form, kept: Kept, dhs: Sequence[Any], d_down: Array | None):
  """(gradients of the matrices `ups` and their biases, those of the hidden arrays)."""
  given, xs = kept.given, list(kept.rows)
  if not xs and any(w for w, _ in kept.ups_learn):
    # Not before `dy` and `a` are done with: two arrays fewer at the same time.
    done = dhs[0][0] if d_down is None else d_down
    _, tokens = after(done, [one.x for one in given])
    pairs = zip(given, tokens, strict=True)
    xs = [dataclasses.replace(one, x=x).rows() for one, x in pairs]
  groups = [one.groups for one in given]
  of = functools.partial(matrices, groups=groups, num_sms=form.num_sms)
  d_ups = tuple(
    (
      of(xs, [of_one[n] for of_one in dhs]) if xs and learn[0] else None,
      _of_bias(bias, learn[1], [of_one[n] for of_one in dhs], given),
    )
    for n, ((_, bias), learn) in enumerate(
      zip(given[0].ups, kept.ups_learn, strict=True)
    )
  )
  made = [d_matrix for d_matrix, _ in d_ups if d_matrix is not None]
  if made:
    dhs, _ = after(dhs, made)
  return d_ups, dhs


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
  dys: Sequence[Array],
  given: Sequence[Given],
  *,
  weighs: bool = False,
) -> Array | None:
  if bias_EF is None or not learns:
    return None
  total: Any = 0
  for dy_RF, one in zip(dys, given, strict=True):
    if weighs and one.weight_R is not None:
      dy_RF = dy_RF.astype(jnp.float32) * one.weight_R[:, None]
    total += sums(dy_RF, one.groups, BLOCK)
  return total.astype(bias_EF.dtype)
