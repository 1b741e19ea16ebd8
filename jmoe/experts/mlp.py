"""Two matrices with an activation between them."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jmoe.experts._common import as_rows, check, init_mlp
from jmoe.kernels import grouped_ffn
from jmoe.types import Params, Rows
from jmoe.use import marked


@marked(init=init_mlp, check=check, weighs=True, sums=True, buffers=True, matrices=2)
def mlp(
  params: Params,
  rows: Rows | tuple[Rows, ...],
  *,
  activation: Callable[[Array], Array] = jax.nn.gelu,
  matmul: Callable[..., Array] | None = None,
  keep: str = "hidden",
  pieces: int | None = None,
) -> Any:
  """`activation(x up + b) down + c` with the matrices of each row's expert.

  GShard, Switch (ReLU), V-MoE (GELU, biases).

  Args:
    params: `up_EDF`, `down_EFD`, optionally `up_bias_EF`, `down_bias_ED`.
    rows: R rows, grouped by expert; or several such buffers, see `grouped_ffn`.
    activation: elementwise.
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
  up = weights["up_EDF"], weights.get("up_bias_EF")
  down = weights["down_EFD"], weights.get("down_bias_ED")
  return grouped_ffn(rows, (up,), down, activation, matmul, keep=keep, pieces=pieces)
