"""What expert functions share: the check of a width, two matrices to start with."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.kernels.grouped_ffn import check_keep, check_pieces
from jmoe.types import Params, Rows
from jmoe.use import Use, use


def check(
  config: Any,
  *,
  d_ff: int,
  bias: bool | str = False,
  keep: str = "hidden",
  pieces: int | None = None,
  **_: Any,
) -> None:
  """Raises unless numbers are positive whole ones, `bias` and `keep` are known."""
  del config
  if not isinstance(bias, bool) and bias != "hidden":
    raise ValueError(
      f"experts: bias={bias!r}; give True, False, or 'hidden' for those before the "
      "activation alone."
    )
  check_keep(keep)
  check_pieces(pieces)
  if isinstance(d_ff, bool) or not isinstance(d_ff, int) or d_ff < 1:
    raise ValueError(f"experts: d_ff={d_ff!r} must be a whole number of at least 1.")


def as_rows(params: Params, rows: Rows | tuple[Rows, ...]) -> dict[str, Array]:
  """Parameters in the dtype of rows."""
  one = rows if isinstance(rows, Rows) else rows[0]
  return {name: w.astype(one.x.dtype) for name, w in params.items()}


def init_mlp(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  d_ff: int,
  bias: bool | str = False,
  initializer: Use = use(initializers.fan_in),
) -> dict[str, Array]:
  """`up_EDF`, `down_EFD`, and their biases if asked for; "hidden": that of `up`."""
  up, down = jax.random.split(key)
  params = {
    "up_EDF": initializer(up, (num_experts, d_model, d_ff), dtype),
    "down_EFD": initializer(down, (num_experts, d_ff, d_model), dtype),
  }
  if bias:
    params["up_bias_EF"] = jnp.zeros((num_experts, d_ff), dtype)
  if bias is True:
    params["down_bias_ED"] = jnp.zeros((num_experts, d_model), dtype)
  return params
