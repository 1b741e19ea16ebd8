"""A gate per task over the same expert outputs (MMoE)."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.routers.token_choice import pick
from jmoe.types import Params, Plan, wide
from jmoe.use import marked


def _check(config, *, num_tasks: int) -> None:
  del config
  if not isinstance(num_tasks, int) or num_tasks < 1:
    raise ValueError(f"per_task: num_tasks={num_tasks!r} must be at least 1.")


def _init(
  key: Array, *, d_model: int, num_experts: int, dtype: Any, num_tasks: int
) -> dict[str, Array]:
  shape = (num_tasks, d_model, num_experts)
  return {"kernel_MDE": d_model**-0.5 * jax.random.normal(key, shape, dtype)}


@marked(init=_init, check=_check, ignores=lambda **_: ("residual",))
def per_task(
  params: Params,
  y_TKD: Array,
  plan: Plan,
  x_TD: Array,
  residual_TD: Array | None = None,
) -> Array:
  """`f_m(x) = sum_e softmax(x W_m)_e E_e(x)` for every task m.

  Ma et al. 2018 (MMoE, KDD), equations 6 and 7.  Under a router that does not choose
  every expert, the sum runs over the chosen ones.

  Args:
    params: `kernel_MDE`.
    y_TKD: outputs of the chosen experts; dropped ones are zero.
    plan: names the experts chosen.
    x_TD: the layer's input.
    residual_TD: not read.

  Returns:
    `[T,M,D]`, M tasks.
  """
  del residual_TD
  dtype = wide(x_TD)
  kernel_MDE = params["kernel_MDE"].astype(dtype)
  logits_MTE = jnp.einsum(
    "TD,MDE->MTE", x_TD.astype(dtype), kernel_MDE, precision=jax.lax.Precision.HIGHEST
  )
  gate_MTE = jax.nn.softmax(logits_MTE)
  expert_TK = plan.routing.expert.reshape(y_TKD.shape[:2])
  gate_MTK = jax.vmap(pick, (0, None))(gate_MTE, expert_TK)
  y_TMD = jnp.einsum("MTK,TKD->TMD", gate_MTK, y_TKD.astype(dtype))
  return y_TMD.astype(y_TKD.dtype)
