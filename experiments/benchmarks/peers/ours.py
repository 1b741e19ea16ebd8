"""jmoe's layer from given choices: assignment, dispatch, experts, the way home.

The gate's product and the selection are not part of it, as they are not of the peers.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jmoe
from experiments.benchmarks.shapes import Shape
from jmoe import combine
from jmoe.assign import assign, capacity
from jmoe.layer import Experts
from jmoe.types import Context, Routing
from jmoe.use import use


def layer(
  shape: Shape,
  *,
  capacity_factor: float | None = None,
  keep: str = "hidden",
  pieces: int | None = None,
  matmul: Any = None,
) -> Callable[[Any, Array, Array, Array], Array]:
  """`(params, x_TD, weight_TK, expert_TK) -> y_TD`; `matmul` is that of `glu`."""
  limit = None
  if capacity_factor is not None:
    limit = use(capacity.by_factor, factor=capacity_factor)
  experts = use(
    jmoe.experts.glu, d_ff=shape.d_ff, keep=keep, pieces=pieces, matmul=matmul
  )
  dispatch = jmoe.dispatch.sort if limit is None else jmoe.dispatch.buckets

  def call(params: Any, x_TD: Array, weight_TK: Array, expert_TK: Array) -> Array:
    plan = assign(routing(shape, weight_TK, expert_TK), Context(), capacity=limit)
    home = combine.weighted_sum(plan)
    return dispatch(x_TD, plan, Experts(experts, params), home)

  return call


def routing(shape: Shape, weight_TK: Array, expert_TK: Array) -> Routing:
  """Given choices as the layer has them."""
  T, K = expert_TK.shape
  nothing_TE = jnp.zeros((T, shape.num_experts), jnp.float32)
  all_N = jnp.ones(T * K, bool)
  return Routing(
    token=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
    expert=expert_TK.reshape(-1),
    weight=weight_TK.reshape(-1),
    live=all_N,
    queues=all_N,
    probs=nothing_TE,
    logits=nothing_TE,
    k=K,
  )


def plain(
  shape: Shape, ragged_dot: Callable[..., Array], *, both_ways: bool = False
) -> Callable[[Any, Array, Array, Array], Array]:
  """The layer that many libraries have: sort, three ragged products, sort back.

  Args:
    shape: of the layer.
    ragged_dot: of rows, matrices and group sizes.
    both_ways: reorder by gathers in the gradient too, where jax would scatter; so that
      a kernel is not charged for what surrounds it.
  """

  def call(params: Any, x_TD: Array, weight_TK: Array, expert_TK: Array) -> Array:
    T, K = expert_TK.shape
    order = jnp.argsort(expert_TK.reshape(-1), stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(expert_TK.reshape(-1), length=shape.num_experts)
    x_ND = spread(x_TD, order, back, K) if both_ways else x_TD[order // K]
    gate, up = (ragged_dot(x_ND, params[n], sizes) for n in ("gate_EDF", "up_EDF"))
    y_ND = ragged_dot(jax.nn.silu(gate) * up, params["down_EFD"], sizes)
    y_ND = reordered(y_ND, back, order) if both_ways else y_ND[back]
    y_TKD = y_ND.reshape(T, K, -1)
    return jnp.einsum("tkd,tk->td", y_TKD, weight_TK.astype(y_TKD.dtype))

  return call


@jax.custom_vjp
def reordered(rows: Array, index: Array, inverse: Array) -> Array:
  """`rows[index]` of a permutation, whose gradient is a gather by the inverse."""
  del inverse
  return rows[index]


reordered.defvjp(
  lambda rows, index, inverse: (rows[index], inverse),
  lambda inverse, grad: (grad[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_TD: Array, order: Array, back: Array, k: int) -> Array:
  """A row for each choice, in their order; the gradient gathers and adds k."""
  del back
  return x_TD[order // k]


def _gathered(k, back, grad_ND):
  N, D = grad_ND.shape
  return grad_ND[back].reshape(N // k, k, D).sum(axis=1), None, None


spread.defvjp(lambda x, order, back, k: (x[order // k], back), _gathered)


def operands(shape: Shape, dtype: Any = jnp.bfloat16) -> tuple[Any, Array]:
  """(params of the experts, x_TD), random."""
  keys = jax.random.split(jax.random.key(0), 4)
  D, F, E = shape.d_model, shape.d_ff, shape.num_experts

  def matrices(key, *size):
    scale = jnp.asarray(size[1] ** -0.5, dtype)
    return jax.random.normal(key, size, dtype) * scale

  params = {
    "gate_EDF": matrices(keys[0], E, D, F),
    "up_EDF": matrices(keys[1], E, D, F),
    "down_EFD": matrices(keys[2], E, F, D),
  }
  return params, jax.random.normal(keys[3], (shape.tokens, D), dtype)


# Name -> what gives this library's layer, or one that is made of ragged products.
LAYERS = {
  "jmoe dropless": layer,
  "jmoe dropless, one piece": functools.partial(layer, pieces=1),
  "jmoe capacity 1.25": functools.partial(layer, capacity_factor=1.25),
  "plain, jmoe.ragged_dot": functools.partial(plain, ragged_dot=jmoe.ragged_dot),
  "plain, jax.lax.ragged_dot": functools.partial(plain, ragged_dot=jax.lax.ragged_dot),
}


def missing(_: str) -> None:
  """It runs wherever jax does."""
