"""How a shared or residual expert's output joins the sparse one.

`(params, y_TD, shared_TD, x_TD) -> y_TD`.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Params, wide
from jmoe.use import marked


def add(params: Params, y_TD: Array, shared_TD: Array, x_TD: Array) -> Array:
  """`y + shared(x)`: DeepSeekMoE (arXiv 2401.06066), and PR-MoE's text (2201.05596)."""
  del params, x_TD
  return y_TD + shared_TD


def _init_gate(key: Array, *, d_model: int, dtype: Any) -> dict[str, Array]:
  return {"gate_D": d_model**-0.5 * jax.random.normal(key, (d_model,), dtype)}


@marked(init=_init_gate)
def sigmoid_gate(params: Params, y_TD: Array, shared_TD: Array, x_TD: Array) -> Array:
  """`y + sigmoid(x . g) shared(x)`: Qwen2-MoE (arXiv 2407.10671).

  Args:
    params: `gate_D`.
    y_TD, shared_TD, x_TD: the sparse output, the shared one, the layer's input.
  """
  dtype = wide(x_TD)
  gate_D1 = params["gate_D"].astype(dtype)[:, None]
  score_T1 = jnp.dot(x_TD.astype(dtype), gate_D1, precision=jax.lax.Precision.HIGHEST)
  return y_TD + (jax.nn.sigmoid(score_T1) * shared_TD.astype(dtype)).astype(y_TD.dtype)


def _init_blend(key: Array, *, d_model: int, dtype: Any) -> dict[str, Array]:
  kernel = d_model**-0.5 * jax.random.normal(key, (d_model, 2), dtype)
  return {"kernel_D2": kernel, "bias_2": jnp.zeros(2, dtype)}


@marked(init=_init_blend)
def blend(params: Params, y_TD: Array, shared_TD: Array, x_TD: Array) -> Array:
  """`w0 y + w1 shared(x)`, `w = softmax(x A + b)`: PR-MoE as DeepSpeed ships it.

  Args:
    params: `kernel_D2`, `bias_2`.
    y_TD, shared_TD, x_TD: the sparse output, the residual one, the layer's input.
  """
  dtype = wide(x_TD)
  score_T2 = jnp.dot(
    x_TD.astype(dtype),
    params["kernel_D2"].astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  w_T2 = jax.nn.softmax(score_T2 + params["bias_2"].astype(dtype))
  mixed = w_T2[:, :1] * y_TD.astype(dtype) + w_T2[:, 1:] * shared_TD.astype(dtype)
  return mixed.astype(y_TD.dtype)
