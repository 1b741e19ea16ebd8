"""One matrix: the gate of nearly every system."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax.numpy as jnp
from jax import Array

from jmoe import initializers
from jmoe.gates._product import product
from jmoe.types import Context, Params
from jmoe.use import Use, marked, use


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  bias: bool = False,
  initializer: Use = use(initializers.truncated_normal),
) -> dict[str, Array]:
  params = {"kernel_DE": initializer(key, (d_model, num_experts), dtype)}
  if bias:
    params["bias_E"] = jnp.zeros(num_experts, dtype)
  return params


@marked(init=_init)
def linear(params: Params, x_TD: Array, context: Context) -> Array:
  """Logits `x W`, plus a bias if it was asked for (gpt-oss).

  Shazeer et al. 2017 (arXiv 1701.06538), equation 4 without its noise.

  Args:
    params: `kernel_DE`, optionally `bias_E`.
    x_TD: activations of any float dtype.
    context: not read.

  Keywords of `use`: `bias=False`, `initializer=use(initializers.truncated_normal)`.

  Returns:
    f32[T,E] logits.
  """
  del context
  logits_TE = product("TD,DE->TE", x_TD, params["kernel_DE"])
  if "bias_E" in params:
    logits_TE = logits_TE + params["bias_E"].astype(logits_TE.dtype)
  return logits_TE
