"""Soft MoE's transport: slots are averages over tokens, outputs over slots."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.types import Groups, Home, Mixing, Rows
from jmoe.use import marked


@marked(dropless=None, dense=True, exchanges=True)
def mix(
  x_TD: Array,
  plan: Mixing,
  experts: Callable[[Rows], Array],
  home: Home | None = None,
  *,
  axis: tuple[str, ...] = (),
) -> Array:
  """Two dense products around the experts; nothing is dropped.

  Puigcerver et al. 2023 (arXiv 2308.00951), equations 2 and 3.

  Args:
    x_TD: activations, `G * S` tokens.
    plan: the two mixing arrays, f32[G,S,E,C].
    experts: rows -> [R,D].
    home: not read; combine weights are in the plan.
    axis: mesh axes over which the experts are; their slots travel there and back.

  Returns:
    `[T,D]` in x's dtype.
  """
  del home
  G, S, E, C = plan.dispatch.shape
  dtype = plan.dispatch.dtype

  def product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)

  x_GSD = x_TD.reshape(G, S, -1).astype(dtype)
  x_EGCD = product("GSEC,GSD->EGCD", plan.dispatch, x_GSD).astype(x_TD.dtype)
  if axis:
    x_EGCD = lax.all_to_all(x_EGCD, axis, 0, 1, tiled=True)
  local, slots = x_EGCD.shape[0], math.prod(x_EGCD.shape[1:3])
  groups = Groups(
    start=jnp.arange(local, dtype=jnp.int32) * slots,
    rows=jnp.full(local, slots, jnp.int32),
    capacity=slots,
  )
  y_RD = experts(Rows(x_EGCD.reshape(local * slots, -1), groups))
  y_EGCD = y_RD.reshape(*x_EGCD.shape[:3], -1)
  if axis:
    y_EGCD = lax.all_to_all(y_EGCD, axis, 1, 0, tiled=True)
  y_GSD = product("GSEC,EGCD->GSD", plan.combine, y_EGCD.astype(dtype))
  return y_GSD.reshape(G * S, -1).astype(x_TD.dtype)
