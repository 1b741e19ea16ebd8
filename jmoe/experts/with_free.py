"""Zero-computation experts beside ordinary ones: constant, copy, zero (MoE++)."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.grouped_matmul.reference import expert_of_rows
from jmoe.types import Params, Rows, wide
from jmoe.use import Use, marked


def _check(
  config, *, base: Use, constant: int = 0, copy: int = 0, zero: int = 0
) -> None:
  free = constant + copy + zero
  if min(constant, copy, zero) < 0 or not 0 < free < config.num_experts:
    raise ValueError(
      f"with_free: constant={constant}, copy={copy}, zero={zero} leave "
      f"{config.num_experts - free} of num_experts={config.num_experts} for "
      f"{base.name}; leave at least 1 and make at least 1 free."
    )


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  base: Use,
  constant: int = 0,
  copy: int = 0,
  zero: int = 0,
) -> dict[str, Any]:
  first, second = jax.random.split(key)
  ordinary = num_experts - constant - copy - zero
  params: dict[str, Any] = {
    "base": base.init(first, d_model=d_model, num_experts=ordinary, dtype=dtype)
  }
  if constant:
    std = d_model**-0.5
    params["mix_CD2"] = std * jax.random.normal(second, (constant, d_model, 2), dtype)
    params["constant_CD"] = jnp.zeros((constant, d_model), dtype)
  return params


@marked(init=_init, check=_check)
def with_free(
  params: Params,
  rows: Rows,
  *,
  base: Use,
  constant: int = 0,
  copy: int = 0,
  zero: int = 0,
) -> Array:
  """The last experts cost nothing: constant ones, then copies, then zeros.

  MoE++ (arXiv 2410.07348), section 3.2, and LongCat's identity experts (2509.01322).
  A constant expert gives `a1 x + a2 v` with `(a1, a2) = softmax(x W)`, a copy `x`, a
  zero 0.

  Args:
    params: `base`, and with constants `mix_CD2`, `constant_CD`.
    rows: R rows of all experts.
    base: the ordinary experts, which come first.
    constant, copy, zero: how many of each.

  Returns:
    `[R,D]` in the rows' dtype.
  """
  x_RD = rows.gathered()
  num_experts = rows.groups.start.shape[0]
  ordinary = num_experts - constant - copy - zero
  # The base multiplies by its own matrices only, so rows of other experts cost nothing.
  y_RD = base(params["base"], Rows(x_RD, rows.groups, travels=rows.travels))
  e_R1 = expert_of_rows(rows.groups, x_RD.shape[0])[:, None]
  y_RD = jnp.where(e_R1 < ordinary, y_RD, 0)
  for c in range(constant):
    mix_D2 = params["mix_CD2"][c].astype(x_RD.dtype)
    a_R2 = jax.nn.softmax((x_RD @ mix_D2).astype(wide(x_RD))).astype(x_RD.dtype)
    v_D = params["constant_CD"][c].astype(x_RD.dtype)
    made_RD = a_R2[:, :1] * x_RD + a_R2[:, 1:] * v_D
    y_RD = jnp.where(e_R1 == ordinary + c, made_RD, y_RD)
  copies = (e_R1 >= ordinary + constant) & (e_R1 < ordinary + constant + copy)
  return jnp.where(copies, x_RD, y_RD)
