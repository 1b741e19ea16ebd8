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
  """The gate's buffer from the experts: gate projection if there is one, else up.

  Of stacked layers too, whose arrays have a leading [R].
  """
  keys_EDF = expert_params.get("gate_EDF", expert_params["up_EDF"])
  mean_ED = jnp.mean(jax.lax.stop_gradient(keys_EDF).astype(jnp.float32), axis=-1)
  return {"key_ED": mean_ED}


def _after_step(
  expert_params: Params,
  old: Params,
  *,
  refresh: bool = False,
  momentum: float = 0.0,
) -> Params:
  return _moved(expert_params, old, momentum) if refresh else old


def _moved(expert_params: Params, old: Params, momentum: float) -> dict[str, Array]:
  new_ED = _buffers(expert_params)["key_ED"]
  if momentum:
    new_ED = momentum * old["key_ED"] + (1 - momentum) * new_ED
  return {"key_ED": new_ED}


def _check(config, *, refresh: bool = False, momentum: float = 0.0) -> None:
  del config
  if not 0 <= momentum < 1:
    raise ValueError(f"keys: momentum={momentum}; give a share from 0 to under 1.")
  if momentum and not refresh:
    raise ValueError(
      f"keys: momentum={momentum} without refresh=True is never read; give both."
    )


@marked(buffers=_buffers, after_step=_after_step, check=_check)
def keys(
  params: Params,
  x_TD: Array,
  context: Context,
  *,
  refresh: bool = False,
  momentum: float = 0.0,
) -> Array:
  """Logits `x . mean_j key_j` over the keys (FFN input weights) of each expert.

  EMoE (arXiv 2310.10908), avg-k gating: the mean of un-normalised keys, biases left
  out.  No parameter of its own and no gradient to the keys.  The means are frozen, or
  taken anew from the keys after every optimizer step: by `nnx.MoE.update`, and by
  `linen.MoE` when it is called next; `refresh_keys` is for loops of another kind.

  Args:
    params: `key_ED`, from `State.gate`.
    x_TD: activations.
    context: not read.
    refresh: take the means anew after every step; not read here.
    momentum: share of the old means that a refresh keeps; the authors' is 0.

  Returns:
    f32[T,E] logits.
  """
  del context, refresh, momentum
  return product("TD,ED->TE", x_TD, jax.lax.stop_gradient(params["key_ED"]))


def refresh_keys(params: Params, state: State, *, momentum: float = 0.0) -> State:
  """The state with `key_ED` taken anew from a layer's expert parameters.

  Args:
    params: of the layer, after the optimizer step.
    state: of the layer.
    momentum: share of the old means that is kept.
  """
  moved = _moved(params["experts"], state.gate, momentum)
  return dataclasses.replace(state, gate=moved)
