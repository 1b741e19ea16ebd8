"""How far a step over several devices is from float32, on what can be recomputed.

Four tokens' outputs and gradients, and the gradient of one expert's last matrix, which
is a sum over the tokens of all devices.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.benchmarks.mesh.layer import Operands
from experiments.benchmarks.peers import rows
from experiments.benchmarks.peers.jax_rows import NAMES, exact, gap


def errors(given: Operands, arguments: tuple[Any, ...], results: Any) -> dict[str, Any]:
  """Relative errors, and the share that was dropped.

  Args:
    given: the operands.
    arguments: of the step.
    results: of the step.
  """
  params, x_TD, weight_TK, dy_TD, expert_TK = arguments
  y_TD, dropped, (d_params, dx_TD, dweight_TK) = results
  found, exactly = [], []
  for t in rows.tokens(given.shape):
    chosen = np.asarray(taken(expert_TK, t))
    matrices = [jnp.stack([taken(params[name], e) for e in chosen]) for name in NAMES]
    x_D, weight_K, dy_D = (taken(a, t) for a in (x_TD, weight_TK, dy_TD))
    exactly.append(exact(x_D, weight_K, matrices, dy_D))
    found.append([taken(a, t) for a in (y_TD, dx_TD, dweight_TK)])
  gaps = [
    float(gap(jnp.stack(one), jnp.stack(other)))
    for one, other in zip(zip(*found, strict=True), zip(*exactly, strict=True),
                          strict=True)
  ]  # fmt: skip
  last = given.shape.num_experts - 1
  expected = _matrix(params, last, x_TD, weight_TK, dy_TD, expert_TK)
  return {
    "error": gaps[0],
    "gradient_error": max(gaps[1:]),
    "matrix_error": float(gap(taken(d_params["down_EFD"], last), expected)),
    "dropped": float(np.mean(jax.device_get(dropped))),
  }


def taken(array: Array, index: int) -> Array:
  """One row of an array whose first dimension is split, on the first device."""
  (found,) = _rows(array, np.array([index]))
  return found[0]


def _rows(array: Array, index_N: Any) -> list[Array]:
  """Some rows, as one array from each device that has any of them."""
  found = []
  for shard in array.addressable_shards:
    first = shard.index[0].start or 0
    own = index_N[(index_N >= first) & (index_N < first + shard.data.shape[0])] - first
    if len(own) and shard.replica_id == 0:
      found.append(jax.device_put(shard.data[own], jax.devices()[0]))
  return found


def _matrix(params, expert, x_TD, weight_TK, dy_TD, expert_TK) -> Array:
  """f32[F,D] the gradient of an expert's last matrix."""
  token_N, choice_N = np.nonzero(np.asarray(jax.device_get(expert_TK)) == expert)
  x_ND, dy_ND = (jnp.concatenate(_rows(a, token_N)) for a in (x_TD, dy_TD))
  weight_N = jnp.asarray(np.asarray(jax.device_get(weight_TK))[token_N, choice_N])
  gate_DF, up_DF = (taken(params[name], expert) for name in NAMES[:2])
  return _down(x_ND, weight_N, dy_ND, gate_DF, up_DF)


@jax.jit
def _down(x_ND, weight_N, dy_ND, gate_DF, up_DF):
  x_ND, dy_ND, gate_DF, up_DF = (
    a.astype(jnp.float32) for a in (x_ND, dy_ND, gate_DF, up_DF)
  )
  with jax.default_matmul_precision("highest"):
    hidden_NF = jax.nn.silu(x_ND @ gate_DF) * (x_ND @ up_DF)
    return hidden_NF.T @ (dy_ND * weight_N[:, None])
