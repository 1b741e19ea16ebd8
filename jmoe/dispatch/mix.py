"""Soft MoE's transport: slots are averages over tokens, outputs over slots."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Groups, Home, Mixing, Rows
from jmoe.use import marked


@marked(dropless=None, dense=True)
def mix(
  x_TD: Array, plan: Mixing, experts: Callable[[Rows], Array], home: Home | None = None
) -> Array:
  """Two dense products around the experts; nothing is dropped.

  Puigcerver et al. 2023 (arXiv 2308.00951), equations 2 and 3.

  Args:
    x_TD: activations, `G * S` tokens.
    plan: the two mixing arrays, f32[G,S,E,C].
    experts: rows -> [R,D].
    home: not read; combine weights are in the plan.

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
  groups = Groups(
    start=jnp.arange(E, dtype=jnp.int32) * (G * C),
    rows=jnp.full(E, G * C, jnp.int32),
    capacity=G * C,
  )
  y_RD = experts(Rows(x_EGCD.reshape(E * G * C, -1), groups))
  y_GSD = product(
    "GSEC,EGCD->GSD", plan.combine, y_RD.reshape(E, G, C, -1).astype(dtype)
  )
  return y_GSD.reshape(G * S, -1).astype(x_TD.dtype)
