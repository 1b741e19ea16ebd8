"""One gate matrix per modality or domain."""
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
  key: Array, *, d_model: int, num_experts: int, dtype: Any, num_modalities: int
) -> dict[str, Array]:
  shape = (num_modalities, d_model, num_experts)
  return {"kernel_MDE": initializers.truncated_normal(key, shape, dtype)}


@marked(init=_init, needs=("modality",))
def per_modality(params: Params, x_TD: Array, context: Context) -> Array:
  """Logits `x W_m` with m the token's modality.

  Every modality's logits are formed and one is selected: M products of width E cost
  less than gathering a matrix per token, and the gradient needs no scatter.

  Args:
    params: `kernel_MDE`.
    x_TD: activations.
    context: `modality` i32[T] is read.

  Keywords of `use`: `num_modalities`.

  Returns:
    f32[T,E] logits; zero where the modality is out of range.
  """
  assert context.modality is not None
  logits_TME = product("TD,MDE->TME", x_TD, params["kernel_MDE"])
  own_TM = jax.nn.one_hot(context.modality, logits_TME.shape[1], dtype=logits_TME.dtype)
  return jnp.sum(logits_TME * own_TM[:, :, None], axis=1)
