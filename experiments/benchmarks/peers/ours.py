"""jmoe's layer from given choices: assignment, dispatch, experts, the way home.

The gate's product and the selection are not part of it, as they are not of the peers.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jmoe
from experiments.benchmarks.shapes import Shape
from jmoe import combine
from jmoe.assign import assign, capacity
from jmoe.types import Context, Routing
from jmoe.use import use


def layer(
  shape: Shape, *, capacity_factor: float | None = None, matmul: Any = None
) -> Callable[[Any, Array, Array, Array], Array]:
  """`(params, x_TD, weight_TK, expert_TK) -> y_TD`; `matmul` is that of `glu`."""
  limit = None
  if capacity_factor is not None:
    limit = use(capacity.by_factor, factor=capacity_factor)
  dispatch = jmoe.dispatch.sort if limit is None else jmoe.dispatch.buckets

  def call(params: Any, x_TD: Array, weight_TK: Array, expert_TK: Array) -> Array:
    T, K = expert_TK.shape
    nothing_TE = jnp.zeros((T, shape.num_experts), jnp.float32)
    all_N = jnp.ones(T * K, bool)
    routing = Routing(
      token=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
      expert=expert_TK.reshape(-1),
      weight=weight_TK.reshape(-1),
      live=all_N,
      queues=all_N,
      probs=nothing_TE,
      logits=nothing_TE,
      k=K,
    )
    plan = assign(routing, Context(), capacity=limit)
    return dispatch(
      x_TD,
      plan,
      lambda rows: jmoe.experts.glu(params, rows, matmul=matmul),
      combine.weighted_sum(plan),
    )

  return call


def plain(
  shape: Shape, ragged_dot: Callable[..., Array]
) -> Callable[[Any, Array, Array, Array], Array]:
  """The layer that many libraries have: sort, three ragged products, sort back."""

  def call(params: Any, x_TD: Array, weight_TK: Array, expert_TK: Array) -> Array:
    K = expert_TK.shape[1]
    order = jnp.argsort(expert_TK.reshape(-1), stable=True)
    sizes = jnp.bincount(expert_TK.reshape(-1), length=shape.num_experts)
    x_ND = x_TD[order // K]
    gate, up = (ragged_dot(x_ND, params[n], sizes) for n in ("gate_EDF", "up_EDF"))
    y_ND = ragged_dot(jax.nn.silu(gate) * up, params["down_EFD"], sizes)
    y_TKD = y_ND[jnp.argsort(order)].reshape(*expert_TK.shape, -1)
    return jnp.einsum("tkd,tk->td", y_TKD, weight_TK.astype(y_TKD.dtype))

  return call


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


def error(
  params: Any, x_TD: Array, y_TD: Array, weight_TK: Any, expert_TK: Any, count: int = 4
) -> float:
  """Relative error of some tokens against float32 at the highest precision."""

  @jax.jit
  def exact(x_D, matrices):
    gate, up, down = (m.astype(jnp.float32) for m in matrices)
    dot = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    return dot(jax.nn.silu(dot(x_D, gate)) * dot(x_D, up), down)

  worst = 0.0
  for t in range(0, x_TD.shape[0], x_TD.shape[0] // count):
    x_D = x_TD[t].astype(jnp.float32)
    expected = sum(
      w * exact(x_D, [params[n][e] for n in ("gate_EDF", "up_EDF", "down_EFD")])
      for w, e in zip(weight_TK[t], expert_TK[t], strict=True)
    )
    gap = jnp.linalg.norm(y_TD[t].astype(jnp.float32) - expected)
    worst = max(worst, float(gap / jnp.linalg.norm(expected)))
  return worst
