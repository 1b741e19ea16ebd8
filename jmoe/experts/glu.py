"""Three matrices: a gated linear unit (SwiGLU, GEGLU, ReGLU)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.experts._common import check_width, init_mlp
from jmoe.kernels import grouped_ffn
from jmoe.kernels.grouped_ffn import gated_layer
from jmoe.types import Layout, Params, Rows
from jmoe.use import Use, marked, use


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  d_ff: int,
  bias: bool = False,
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


def _whole(
  params: Params,
  x_TD: Array,
  layout: Layout,
  weight_N: Array,
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
  matmul: Callable[..., Array] | None = None,
) -> Array | None:
  """The layer at once, where Hopper's kernels serve it."""
  if matmul is not None:
    return None
  gate, up, down = _matrices(params, x_TD.dtype)
  hidden = use(_gated, activation=activation)
  return gated_layer(x_TD, weight_N, (gate, up), down, layout, hidden)


@marked(init=_init, check=check_width, matrices=3, whole=_whole)
def glu(
  params: Params,
  rows: Rows,
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
  matmul: Callable[..., Array] | None = None,
) -> Array:
  """`(activation(x gate) * (x up)) down` with the matrices of each row's expert.

  Shazeer 2020 (arXiv 2002.05202), equation 6: SwiGLU with silu, GEGLU with gelu.

  Args:
    params: `gate_EDF`, `up_EDF`, `down_EFD`, optionally a bias for each.
    rows: R rows, grouped by expert.
    activation: of the gate branch.
    matmul: a grouped matmul, as `use(kernels.grouped_matmul, implementation=...)`;
      None takes the best form for the device, fused where there is one.

  Keywords of `use`: also `d_ff`, `bias=False`, `initializer=use(initializers.fan_in)`.

  Returns:
    `[R,D]` in the rows' dtype.
  """
  x_RD = rows.gathered()
  gate, up, down = _matrices(params, x_RD.dtype)
  hidden = use(_gated, activation=activation)
  return grouped_ffn(x_RD, (gate, up), down, rows.groups, hidden, matmul)


@marked(gated=True)
def _gated(gate: Array, up: Array, *, activation: Callable[[Array], Array]) -> Array:
  return activation(gate) * up


def _matrices(params: Params, dtype: Any) -> tuple[Any, Any, Any]:
  """Gate, up and down in a dtype, each with its bias or None."""
  cast = {name: w.astype(dtype) for name, w in params.items()}
  return (
    (cast["gate_EDF"], cast.get("gate_bias_EF")),
    (cast["up_EDF"], cast.get("up_bias_EF")),
    (cast["down_EFD"], cast.get("down_bias_ED")),
  )
