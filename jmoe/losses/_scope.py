"""What the losses share: sums over the tokens of a scope, and the mean over scopes.

A scope is a set of tokens whose statistics are pooled before the loss is taken.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jmoe.parallel.shards import Shards
from jmoe.types import Context, Plan, Routing, num_groups, wide
from jmoe.use import nearest

SCOPES = ("sequence", "group", "batch", "mesh")
Axes = str | Sequence[str] | None


def check_scope(over: str) -> None:
  """Raises ValueError for a scope that does not exist."""
  if over not in SCOPES:
    raise ValueError(f"losses: unknown scope over={over!r}; {nearest(over, SCOPES)}")


def token_choice(plan: Plan, name: str) -> Routing:
  """The routing of a plan in which every token makes the same number of choices.

  Raises:
    ValueError: the router is of another kind (expert choice, soft).
  """
  routing = getattr(plan, "routing", None)
  if routing is None or routing.k is None:
    raise ValueError(
      f"{name}: the router gives tokens no fixed number of choices (expert choice and "
      f"soft routing balance by construction); leave {name} out of `losses`."
    )
  return routing


class Pool(NamedTuple):
  """Sums over the tokens of each scope, and the mean over scopes."""

  local: Callable[[Array], Array]  # f[T,...] -> f[Z,...] on this shard
  within: tuple[str, ...]  # mesh axes that split a scope
  between: tuple[str, ...]  # mesh axes whose shards hold other scopes

  def __call__(self, x: Array) -> Array:
    """`f[T,...]` summed to `f[Z,...]`."""
    return _psum(self.local(x), self.within)

  def mean(self, value_Z: Array, tokens_Z: Array) -> Array:
    """f32[] mean over the scopes that hold a token; 0 if none does."""
    some_Z = tokens_Z > 0
    count = _psum(some_Z.sum(dtype=value_Z.dtype), self.between)
    total = _psum(jnp.where(some_Z, value_Z, 0).sum(), self.between)
    return total / jnp.maximum(count, 1)


def _psum(x: Array, axes: tuple[str, ...]) -> Array:
  return lax.psum(x, axes) if axes else x


def sums(over: str, routing: Routing, context: Context, axes: Axes) -> Pool:
  """What sums `f[T,...]` over the tokens of each scope, to `f[Z,...]`.

  Args:
    over: "sequence": rows of the context; "group": routing groups; "batch": all tokens
      at hand, one scope; "mesh": all tokens of all shards, one scope.
    routing: says how many tokens there are, and how long a group is.
    context: `row` and `num_rows` for "sequence"; without `row`, rows are consecutive
      and of equal length.
    axes: mesh axes that "mesh" sums over; without any it equals "batch".  If they are a
      layer's own (`Shards`), the batch is that of the whole call, and so are the other
      scopes: each is pooled over the shards that hold a part of it.

  Raises:
    ValueError: an unknown scope, or a context that does not say what a sequence is.
  """
  check_scope(over)
  given = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
  own = isinstance(axes, Shards)

  def whole(x: Array) -> Array:
    return x.sum(0, keepdims=True)

  if over == "batch" or over == "mesh":
    return Pool(whole, given if over == "mesh" or own else (), ())
  others = given if own else ()
  if over == "group":
    if routing.group_size is None:
      return Pool(whole, others, ())
    return Pool(lambda x: _by_group(x, routing.group_size), (), others)
  num_rows, row_T = context.num_rows, context.row
  if num_rows is None:
    raise ValueError(
      "losses: over='sequence' but the context does not say how many sequences there "
      "are; pass Context(num_rows=...), with row= if they differ in length."
    )
  if row_T is not None:
    return Pool(lambda x: _by_row(x, row_T, num_rows), others, ())
  if routing.num_tokens % num_rows:
    raise ValueError(
      f"losses: over='sequence' with {routing.num_tokens} tokens in num_rows={num_rows}"
      " rows of unequal length; pass Context(row=...) too."
    )
  split = axes.rows if isinstance(axes, Shards) else ()
  return Pool(
    lambda x: x.reshape(num_rows, -1, *x.shape[1:]).sum(1),
    split,
    tuple(a for a in others if a not in split),
  )


def _by_group(x: Array, group_size: int | None) -> Array:
  if group_size is None:
    return x.sum(0, keepdims=True)
  groups = num_groups(x.shape[0], group_size)
  missing = groups * group_size - x.shape[0]  # the last group may be partly empty
  x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(groups, group_size, *x.shape[1:]).sum(1)


def _by_row(x: Array, row_T: Array, num_rows: int) -> Array:
  # A one-hot product, because the gradient of a segment sum's scatter is slow.
  row_Z = jnp.arange(num_rows, dtype=row_T.dtype)
  member_ZT = row_T == row_Z[:, None]
  return jnp.tensordot(member_ZT.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST)


def masked(x_TE: Array, keep_T: Array) -> Array:
  """At least float32, and zero for tokens not kept, whatever they hold (NaN too)."""
  x_TE = x_TE.astype(wide(x_TE))
  return jnp.where(keep_T[:, None], x_TE, 0)


def normalised(probs_TE: Array, keep_T: Array) -> Array:
  """Scores that sum to one for each kept token, so that any score function fits."""
  probs_TE = masked(probs_TE, keep_T)
  # By the largest first: the sum's square, which the gradient of a quotient needs,
  # would underflow for scores of 1e-30.
  largest_T1 = lax.stop_gradient(probs_TE.max(1, keepdims=True))
  probs_TE = probs_TE / jnp.where(largest_T1 > 0, largest_T1, 1)
  total_T1 = probs_TE.sum(1, keepdims=True)
  return probs_TE / jnp.where(total_T1 > 0, total_T1, 1)


def entropy(p_ZE: Array) -> Array:
  """f32[Z] entropy in nats of each row; a term with p = 0 has value and gradient 0."""
  positive = p_ZE > 0
  return -jnp.where(positive, p_ZE * jnp.log(jnp.where(positive, p_ZE, 1)), 0).sum(-1)


def squared_variation(x_ZE: Array) -> Array:
  """f32[Z] squared coefficient of variation of each row: population variance, V-MoE."""
  mean_Z = x_ZE.mean(-1)
  square_Z = jnp.square(mean_Z)
  safe_Z = jnp.where(square_Z > 0, square_Z, 1)
  return jnp.where(square_Z > 0, jnp.var(x_ZE, -1) / safe_Z, 0)
