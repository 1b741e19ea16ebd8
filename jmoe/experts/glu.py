"""Three matrices: a gated linear unit (SwiGLU, GEGLU, ReGLU)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.experts._common import as_rows, check, init_mlp
from jmoe.kernels import grouped_ffn
from jmoe.types import Params, Rows
from jmoe.use import Use, marked, use


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  d_ff: int,
  bias: bool | str = False,
  initializer: Use = use(initializers.fan_in),
) -> dict[str, Array]:
  both, gate = jax.random.split(key)
  params = init_mlp(
    both,
    d_model=d_model,
    num_experts=num_experts,
    dtype=dtype,
    d_ff=d_ff,
    bias=bias,
    initializer=initializer,
  )
  params["gate_EDF"] = initializer(gate, (num_experts, d_model, d_ff), dtype)
  if bias:
    params["gate_bias_EF"] = jnp.zeros((num_experts, d_ff), dtype)
  return params


@marked(init=_init, check=check, weighs=True, sums=True, buffers=True, matrices=3)
def glu(
  params: Params,
  rows: Rows | tuple[Rows, ...],
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
  matmul: Callable[..., Array] | None = None,
  keep: str = "hidden",
  pieces: int | None = None,
) -> Any:
  """`(activation(x gate) * (x up)) down` with the matrices of each row's expert.

  Shazeer 2020 (arXiv 2002.05202), equation 6: SwiGLU with silu, GEGLU with gelu.

  Args:
    params: `gate_EDF`, `up_EDF`, `down_EFD`, optionally a bias for each.
    rows: R rows, grouped by expert; or several such buffers, see `grouped_ffn`.
    activation: of the gate branch.
    matmul: a grouped matmul, as `use(kernels.grouped_matmul, implementation=...)`;
      None takes the best form for the device, fused where there is one.
    keep: for the backward pass, "rows", "hidden" or "inputs"; see `grouped_ffn`.
    pieces: in how many large arrays are made on a Hopper; see `grouped_ffn`.

  Keywords of `use`: also `d_ff`, `bias=False` (True, or "hidden": before the
  activation alone), `initializer=use(initializers.fan_in)`.

  Returns:
    `[R,D]` in the rows' dtype, or `[T,D]` if `rows.sums`; of several
    buffers a tuple.
  """
  weights = as_rows(params, rows)
  gate = weights["gate_EDF"], weights.get("gate_bias_EF")
  up = weights["up_EDF"], weights.get("up_bias_EF")
  down = weights["down_EFD"], weights.get("down_bias_ED")
  hidden = use(_gated, activation=activation)
  return grouped_ffn(rows, (gate, up), down, hidden, matmul, keep=keep, pieces=pieces)


@marked(gated=True)
def _gated(gate: Array, up: Array, *, activation: Callable[[Array], Array]) -> Array:
  return activation(gate) * up
