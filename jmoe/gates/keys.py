"""EMoE's parameter-free gate: the mean of each expert's keys, as a buffer."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.gates._product import product
from jmoe.types import Context, Params, State
from jmoe.use import marked


def _buffers(expert_params: Params) -> dict[str, Array]:
  """The gate's buffer from the experts: gate projection if there is one, else up."""
  keys_EDF = expert_params.get("gate_EDF", expert_params["up_EDF"])
  mean_ED = jnp.mean(jax.lax.stop_gradient(keys_EDF).astype(jnp.float32), axis=2)
  return {"key_ED": mean_ED}


@marked(buffers=_buffers)
def keys(params: Params, x_TD: Array, context: Context) -> Array:
  """Logits `x . mean_j key_j` over the keys (FFN input weights) of each expert.

  EMoE (arXiv 2310.10908), avg-k gating: the mean of un-normalised keys, biases left
  out.  No parameter of its own and no gradient to the keys: `refresh_keys` recomputes
  the buffer after an optimizer step.

  Args:
    params: `key_ED`, from `State.gate`.
    x_TD: activations.
    context: not read.

  Returns:
    f32[T,E] logits.
  """
  del context
  return product("TD,ED->TE", x_TD, jax.lax.stop_gradient(params["key_ED"]))


def refresh_keys(params: Params, state: State) -> State:
  """The state with `key_ED` taken anew from a layer's expert parameters."""
  return dataclasses.replace(state, gate=_buffers(params["experts"]))
