"""gpt-oss's gated unit: interleaved, clamped, with biases."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe._ranges import in_range
from jmoe.experts._common import as_rows, check
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
  initializer: Use = use(initializers.fan_in),
) -> dict[str, Array]:
  up, down = jax.random.split(key)
  return {
    "gate_up_EDF": initializer(up, (num_experts, d_model, 2 * d_ff), dtype),
    "gate_up_bias_EF": jnp.zeros((num_experts, 2 * d_ff), dtype),
    "down_EFD": initializer(down, (num_experts, d_ff, d_model), dtype),
    "down_bias_ED": jnp.zeros((num_experts, d_model), dtype),
  }


def _check(
  config: Any, *, limit: float = 7.0, alpha: float = 1.702, **others: Any
) -> None:
  check(config, **others)
  in_range("clamped_glu: limit", limit, above=True)
  in_range("clamped_glu: alpha", alpha, least=-math.inf)


@marked(init=_init, check=_check, weighs=True, sums=True, buffers=True, matrices=3)
def clamped_glu(
  params: Params,
  rows: Rows | tuple[Rows, ...],
  *,
  limit: float = 7.0,
  alpha: float = 1.702,
  matmul: Callable[..., Array] | None = None,
  keep: str = "hidden",
) -> Any:
  """`((up + 1) * gate * sigmoid(alpha * gate)) down`, gate and up clamped.

  gpt-oss (arXiv 2508.10925): gate is every even column of the fused projection, up
  every odd one; gate is clamped above at `limit`, up to `[-limit, limit]`.

  Args:
    params: `gate_up_EDF` (2*d_ff wide), `gate_up_bias_EF`, `down_EFD`, `down_bias_ED`.
    rows: R rows, grouped by expert; or several such buffers, see `grouped_ffn`.
    limit: of the clamp.
    alpha: slope inside the sigmoid.
    matmul: a grouped matmul; None takes the best form for the device.
    keep: for the backward pass, "rows", "hidden" or "inputs"; see `grouped_ffn`.

  Keywords of `use`: also `d_ff`, `initializer=use(initializers.fan_in)`.

  Returns:
    `[R,D]` in the rows' dtype, or `[T,D]` if `rows.sums`; of several
    buffers a tuple.
  """
  weights = as_rows(params, rows)
  up = weights["gate_up_EDF"], weights["gate_up_bias_EF"]
  down = weights["down_EFD"], weights["down_bias_ED"]
  hidden = use(_interleaved, limit=limit, alpha=alpha)
  return grouped_ffn(rows, (up,), down, hidden, matmul, keep=keep)


def _interleaved(both: Array, *, limit: float, alpha: float) -> Array:
  both_RF2 = both.reshape(both.shape[0], -1, 2)
  gate = jnp.minimum(both_RF2[..., 0], limit)
  up = jnp.clip(both_RF2[..., 1], -limit, limit)
  return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
