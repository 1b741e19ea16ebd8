"""A two-layer gate that may hear the previous layer's logits (MoE++)."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.gates._product import product
from jmoe.types import Context, Params
from jmoe.use import marked


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  d_hidden: int | None = None,
  residual: bool = False,
) -> dict[str, Array]:
  hidden = num_experts if d_hidden is None else d_hidden
  one, two = jax.random.split(key)
  params = {
    "hidden_DH": initializers.fan_in(one, (d_model, hidden), dtype),
    "out_HE": initializers.fan_in(two, (hidden, num_experts), dtype),
  }
  if residual:  # starts without influence
    params["previous_EE"] = jnp.zeros((num_experts, num_experts), dtype)
  return params


def _ignores(*, residual: bool = False, **_: Any) -> tuple[str, ...]:
  return () if residual else ("previous_logits",)


@marked(init=_init, ignores=_ignores)
def mlp(
  params: Params,
  x_TD: Array,
  context: Context,
  *,
  previous_logits: Array | None = None,
) -> Array:
  """Logits `tanh(x A) B`, plus `previous_logits R` with the gating residual.

  MoE++ (arXiv 2410.07348), section 3.3.

  Args:
    params: `hidden_DH`, `out_HE`, and `previous_EE` with `residual=True`.
    x_TD: activations.
    context: not read.
    previous_logits: f32[T,E] of the sparse layer before; None for the first.

  Keywords of `use`: `d_hidden=None` (E), `residual=False`.

  Returns:
    f32[T,E] logits.
  """
  del context
  hidden_TH = jnp.tanh(product("TD,DH->TH", x_TD, params["hidden_DH"]))
  logits_TE = product("TH,HE->TE", hidden_TH, params["out_HE"])
  if previous_logits is not None and "previous_EE" in params:
    logits_TE += product("TE,EF->TF", previous_logits, params["previous_EE"])
  return logits_TE
