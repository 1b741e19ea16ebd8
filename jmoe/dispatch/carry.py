"""Rows out to the experts and home again: one permutation, gathers both ways.

Each function is differentiated by hand into gathers, because the transpose of a gather
is a scatter-add, fifteen times slower than reading the same bytes.  Only routers
without a fixed k (expert choice) add into tokens.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence

import jax
from jax import Array

from jmoe.keeping import named
from jmoe.kernels import permute_rows
from jmoe.kernels.permute_rows.reference import take
from jmoe.types import Home, Layout, Rows, wide


@jax.custom_vjp
def out(x_TD: Array, layout: Layout) -> Array:
  """`[R,D]` the token of every row; padding rows are zero."""
  return permute_rows.spread(x_TD, layout)


def _out_forward(x_TD: Array, layout: Layout):
  return out(x_TD, layout), layout


def _out_backward(layout: Layout, grad_RD: Array):
  return permute_rows.summed(grad_RD, layout).astype(grad_RD.dtype), None


out.defvjp(_out_forward, _out_backward)


@jax.custom_vjp
def spread(weight_N: Array, layout: Layout) -> Array:
  """`f32[R]` the weight of every row; zero for padding rows."""
  return take(weight_N, layout.entry)


def _spread_backward(layout: Layout, grad_R: Array):
  return take(grad_R, layout.row), None


spread.defvjp(lambda w, layout: (spread(w, layout), layout), _spread_backward)


@jax.custom_vjp
def summed_home(rows_RD: Array, layout: Layout) -> Array:
  """`[T,D]` the sums of each token's rows, as they are: `out` turned round."""
  return permute_rows.summed(rows_RD, layout).astype(rows_RD.dtype)


def _summed_home_backward(layout: Layout, grad_TD: Array):
  return permute_rows.spread(grad_TD, layout), None


summed_home.defvjp(
  lambda x, layout: (summed_home(x, layout), layout), _summed_home_backward
)


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
    return permute_rows.summed(rows_RD, layout, way.weight).astype(rows_RD.dtype)
  assert layout.k is not None
  entries_ND = take(rows_RD, layout.row)
  weighed_ND = entries_ND.astype(wide(rows_RD)) * way.weight[:, None]
  return weighed_ND.astype(rows_RD.dtype).reshape(layout.num_tokens, layout.k, -1)


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


@jax.named_scope("carry")
def through(
  x_TD: Array,
  layout: Layout,
  experts: Callable[[Rows], Array],
  way: Home,
  *,
  travels: bool = False,
) -> Array:
  """Out, through the experts, and home: what strategies on one device share.

  With `travels` these tokens came from other devices, and their gradients go back.
  `through_each` takes several buffers, those first that are there first, to one call of
  experts that have a method `each`.

  Experts with a true attribute `weighs`, as those of a layer may have, get the weights
  with their rows, and what they give is summed as it is; those with a true `sums` do
  that themselves, and then need not make all rows at once.  A function around them has
  neither: then the weights come on the way home.
  """
  rows = _asked(x_TD, layout, experts, way, travels)
  return _brought(experts(rows), rows, way)


@jax.named_scope("carry")
def through_each(
  tokens: Sequence[Array],
  layouts: Sequence[Layout],
  experts: Callable[[Rows], Array],
  ways: Sequence[Home],
  *,
  travels: bool = False,
) -> tuple[Array, ...]:
  """As `through`, of several buffers."""
  buffers = tuple(
    _asked(x_TD, layout, experts, way, travels)
    for x_TD, layout, way in zip(tokens, layouts, ways, strict=True)
  )
  found = zip(of_each(experts, buffers), buffers, ways, strict=True)
  return tuple(_brought(y, rows, way) for y, rows, way in found)


def of_each(
  experts: Callable[[Rows], Array], buffers: tuple[Rows, ...]
) -> tuple[Array, ...]:
  """What experts make of several buffers, in one call if they can."""
  each = getattr(experts, "each", None)
  return tuple(map(experts, buffers)) if each is None else each(buffers)


def _asked(
  x_TD: Array,
  layout: Layout,
  experts: Callable[[Rows], Array],
  way: Home,
  travels: bool,
) -> Rows:
  """Tokens for experts, with what these do themselves."""
  layout = named(layout, "routing")
  scale, weight = None, None
  if way.input_scale is not None:
    scale = spread(way.input_scale, layout)
  elif way.sums and getattr(experts, "weighs", False):
    weight = spread(way.weight, layout)
  sums = weight is not None and getattr(experts, "sums", False)
  return Rows(x_TD, layout.groups, layout, scale, weight, sums=sums, travels=travels)


def _brought(y: Array, rows: Rows, way: Home) -> Array:
  """What experts gave, in the order of the tokens."""
  layout = rows.layout
  assert layout is not None
  if rows.sums:
    return y
  if rows.weight is not None:
    return summed_home(y, layout)  # dropped assignments have no row
  return home(y, Home(way.weight, sums=way.sums), layout)
