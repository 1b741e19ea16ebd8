"""Slot embeddings: the gate of Soft MoE."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.gates._product import product
from jmoe.types import Context, Params, wide
from jmoe.use import marked


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  slots_per_expert: int = 1,
) -> dict[str, Array]:
  shape = (d_model, num_experts, slots_per_expert)
  std = d_model**-0.5  # lecun normal
  return {
    "slot_DEC": std * jax.random.normal(key, shape, dtype),
    "scale": jnp.ones((), dtype),
  }


@marked(init=_init, needs=("num_rows",), dense=True)
def slots(params: Params, x_TD: Array, context: Context) -> Array:
  """Logits `scale * cos(x_s, slot_ec)` of every token of a row with every slot.

  Puigcerver et al. 2023 (arXiv 2308.00951), section 2.3: both sides are divided by
  their length over d (1e-6 inside the root), with one learned scale.

  Args:
    params: `slot_DEC`, `scale`.
    x_TD: activations; rows (images) are `num_rows` equal consecutive blocks.
    context: `num_rows` is read.

  Keywords of `use`: `slots_per_expert=1`.

  Returns:
    f32[G,S,E,C] logits, G rows of S tokens.
  """
  dtype = wide(x_TD)
  x_GSD = x_TD.astype(dtype).reshape(context.num_rows, -1, x_TD.shape[1])
  slot_DEC = params["slot_DEC"].astype(dtype)
  slot_DEC = _unit(slot_DEC, 0) * params["scale"].astype(dtype)
  return product("GSD,DEC->GSEC", _unit(x_GSD, 2), slot_DEC)


def _unit(a: Array, axis: int) -> Array:
  return a * jax.lax.rsqrt(jnp.sum(a * a, axis, keepdims=True) + 1e-6)
