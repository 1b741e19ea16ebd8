"""Normalised similarity with a learned temperature (Tutel, Swin-MoE)."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.gates._product import product
from jmoe.types import Context, Params
from jmoe.use import marked

_MAX_SCALE = math.log(100.0)


def _init(
  key: Array, *, d_model: int, num_experts: int, dtype: Any, d_project: int = 256
) -> dict[str, Array]:
  one, two = jax.random.split(key)
  return {
    "project_DP": initializers.fan_in(one, (d_model, d_project), dtype),
    "bias_P": jnp.zeros(d_project, dtype),
    "centre_PE": 0.01 * jax.random.normal(two, (d_project, num_experts), dtype),
    "log_scale": jnp.asarray(math.log(1 / 0.5), dtype),
  }


@marked(init=_init)
def cosine(params: Params, x_TD: Array, context: Context) -> Array:
  """Logits `cos(x P + b, centre_e) * exp(min(t, ln 100))`.

  Tutel (arXiv 2206.03382), section 5.2; temperature starts at `ln 2`, as in its code.

  Args:
    params: `project_DP`, `bias_P`, `centre_PE`, `log_scale`.
    x_TD: activations.
    context: not read.

  Keywords of `use`: `d_project=256`.

  Returns:
    f32[T,E] logits, at most 100 in size.
  """
  del context
  z_TP = product("TD,DP->TP", x_TD, params["project_DP"])
  z_TP = z_TP + params["bias_P"].astype(z_TP.dtype)
  centre_PE = params["centre_PE"].astype(z_TP.dtype)
  scale = jnp.exp(jnp.minimum(params["log_scale"].astype(z_TP.dtype), _MAX_SCALE))
  return scale * product("TP,PE->TE", _unit(z_TP, 1), _unit(centre_PE, 0))


def _unit(a: Array, axis: int) -> Array:
  # The square is bounded below: a zero vector gets zero, not NaN, in both directions.
  square = jnp.sum(a * a, axis, keepdims=True)
  return a * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
