"""Rows out to the experts and home again: one permutation, gathers both ways.

Each function is differentiated by hand into gathers, because the transpose of a gather
is a scatter-add, fifteen times slower than reading the same bytes.  Only routers
without a fixed k (expert choice) add into tokens.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.keeping import named
from jmoe.kernels import permute_rows
from jmoe.kernels.permute_rows.reference import take
from jmoe.types import Home, Layout, Rows, wide


@jax.custom_vjp
def out(x_TD: Array, layout: Layout) -> Array:
  """`[R,D]` the token of every row; padding rows are zero."""
  return permute_rows.take(x_TD, layout.token)


def _out_forward(x_TD: Array, layout: Layout):
  return out(x_TD, layout), layout


def _out_backward(layout: Layout, grad_RD: Array):
  return sum_home(grad_RD, None, layout).astype(grad_RD.dtype), None


out.defvjp(_out_forward, _out_backward)


@jax.custom_vjp
def spread(weight_N: Array, layout: Layout) -> Array:
  """`f32[R]` the weight of every row; zero for padding rows."""
  return take(weight_N, layout.entry)


def _spread_backward(layout: Layout, grad_R: Array):
  return take(grad_R, layout.row), None


spread.defvjp(lambda w, layout: (spread(w, layout), layout), _spread_backward)


@jax.custom_vjp
def home(rows_RD: Array, way: Home, layout: Layout) -> Array:
  """Rows of the expert buffer, weighed, back in token order.

  Args:
    rows_RD: outputs of the experts; rows that no assignment owns are not read.
    way: the coefficient of each assignment, and whether a token's are summed.
    layout: where the rows are.

  Returns:
    `[T,D]`, or `[T,K,D]` if `way.sums` is false, in the rows' dtype; sums are formed in
    at least float32.
  """
  if way.sums:
    return sum_home(rows_RD, way.weight, layout).astype(rows_RD.dtype)
  assert layout.k is not None
  entries_ND = take(rows_RD, layout.row)
  weighed_ND = entries_ND.astype(wide(rows_RD)) * way.weight[:, None]
  return weighed_ND.astype(rows_RD.dtype).reshape(layout.num_tokens, layout.k, -1)


def sum_home(rows_RD: Array, weight_N: Array | None, layout: Layout) -> Array:
  """`[T,D]` sums of each token's rows, weighed or not, in at least float32."""
  dtype, num_tokens = wide(rows_RD), layout.num_tokens
  if layout.k is None:  # tokens differ in how many experts chose them
    weight_R = (
      jnp.ones(layout.num_rows, dtype)
      if weight_N is None
      else take(weight_N, layout.entry).astype(dtype)
    )
    padded = jax.ops.segment_sum(
      jnp.where((layout.token < num_tokens)[:, None], rows_RD, 0).astype(dtype)
      * weight_R[:, None],
      layout.token,
      num_tokens + 1,
    )
    return padded[:num_tokens]
  # One choice rank at a time: [T,K,D] never exists, and XLA makes one kernel of all.
  row_TK = layout.row.reshape(num_tokens, layout.k)
  total_TD = jnp.zeros((num_tokens, rows_RD.shape[1]), dtype)
  for j in range(layout.k):
    part_TD = take(rows_RD, row_TK[:, j]).astype(dtype)
    if weight_N is not None:
      part_TD *= weight_N.reshape(row_TK.shape)[:, j, None].astype(dtype)
    total_TD += part_TD
  return total_TD


def _home_forward(rows_RD: Array, way: Home, layout: Layout):
  return home(rows_RD, way, layout), (rows_RD, way, layout)


def _home_backward(residual, grad: Array):
  rows_RD, way, layout = residual
  if not way.sums:
    grad = grad.reshape(-1, grad.shape[-1])
  index = layout.token if way.sums else layout.entry
  weight_R = take(way.weight, layout.entry)
  # d weight: a dot product per row, brought home by the permutation.  Rows without an
  # owner may hold anything, NaN too, but nothing points at them.
  d_rows, dot_R = permute_rows.weighed(grad, index, weight_R, rows_RD)
  d_weight = take(dot_R, layout.row).astype(way.weight.dtype)
  return d_rows, Home(d_weight, sums=way.sums), None


home.defvjp(_home_forward, _home_backward)


def through(
  x_TD: Array, layout: Layout, experts: Callable[[Rows], Array], way: Home
) -> Array:
  """Out, through the experts, and home: what strategies on one device share.

  Experts that have an attribute `whole` are offered all three at once, and decline by
  returning None.
  """
  layout = named(layout, "routing")
  whole = getattr(experts, "whole", None)
  if whole is not None and way.sums and way.input_scale is None:
    y_TD = whole(x_TD, layout, way.weight)
    if y_TD is not None:
      return y_TD
  scale = None
  if way.input_scale is not None:
    scale = spread(way.input_scale, layout)
  rows_RD = experts(Rows(x_TD, layout.groups, layout, scale))
  way = Home(way.weight, sums=way.sums)  # the input scale has done its part
  return home(rows_RD, way, layout)
