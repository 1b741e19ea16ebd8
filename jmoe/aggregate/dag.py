"""Rounds of gated messages among a token's chosen experts (DAG-MoE)."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Params, Plan, wide
from jmoe.use import marked, shown

_RESIDUALS = ("absorbed", "outer")


def _check(
  config: Any, *, d_message: int, num_rounds: int = 2, residual: str = "absorbed", **_
) -> None:
  for name, value in (("d_message", d_message), ("num_rounds", num_rounds)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(
        f"dag: {name}={shown(value)} must be a whole number, at least 1."
      )
  if residual not in _RESIDUALS:
    raise ValueError(f"dag: residual={shown(residual)}; use 'absorbed' or 'outer'.")
  if config is None:
    return
  if config.scale != "output":
    raise ValueError(
      "scale='input' with aggregate=dag, whose nodes are weighted outputs; use "
      "'output'."
    )
  if residual == "absorbed" and config.join.name == "blend":
    raise ValueError(
      "join=blend with aggregate=dag(residual='absorbed') would weigh the skip "
      "connection too; use join.add, join.sigmoid_gate, or residual='outer'."
    )


def _init(
  key: Array,
  *,
  d_model: int,
  num_experts: int,
  dtype: Any,
  d_message: int,
  num_rounds: int = 2,
  gated: bool = True,
) -> dict[str, Array]:
  del num_experts
  L, D, M, P = num_rounds, d_model, d_message, 4 if gated else 2
  down, mix = jax.random.split(key)
  return {
    "scale_LD": jnp.ones((L, D), dtype),
    "down_LDM": D**-0.5 * jax.random.normal(down, (L, D, M), dtype),
    "mix_LMPM": (2 * M) ** -0.5 * jax.random.normal(mix, (L, M, P, M), dtype),
    "up_LMD": jnp.zeros((L, M, D), dtype),  # at first there are no messages
  }


def _ignores(*, residual: str = "absorbed", **_: Any) -> tuple[str, ...]:
  return ("residual",) if residual == "outer" else ()


def _skips(*, residual: str = "absorbed", **_: Any) -> bool:
  return residual == "absorbed"


def _macs(
  k: int, d_model: int, *, d_message: int, num_rounds: int = 2, gated: bool = True, **_
) -> int:
  """Products of a token; the last round's messages are summed before they go up."""
  D, M, L = d_model, d_message, num_rounds
  mixing = (4 if gated else 2) * M * M
  return k * (L * (D * M + mixing) + (L - 1) * M * D) + M * D


@marked(init=_init, check=_check, ignores=_ignores, skips=_skips, macs=_macs)
def dag(
  params: Params,
  y_TKD: Array,
  plan: Plan,
  x_TD: Array,
  residual_TD: Array | None = None,
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
  gated: bool = True,
  residual: str = "absorbed",
  eps: float = 1e-6,
) -> Array:
  """`sum_i n_i` of a token's K nodes, after rounds of messages among them.

  Feng et al. 2026 (DAG-MoE, arXiv 2606.01062), equations 6 to 12.  Nodes begin as
  `n_i = w_i E_i(x) + h/K`; a round adds to each

    up sum_j act(edge [u_i, u_j]) * (node [u_i, u_j]),   u = down RMSNorm(n)

  with j over all K, i too.  Products with a pair split into one of each node, so all
  four are made at once (`mix`: edge and node, of receiver and sender).  `up` begins at
  zero: the layer begins as the one without messages.  A dropped choice neither sends
  nor receives; its share of h stays.

  Two points are open in the sources.  `activation` is that of the experts (SiLU) by a
  port that quotes the paper, a sigmoid by other notes.  And h is, "absorbed", what the
  block's skip connection carries, which this then replaces: `residual` must be given
  and nothing added; or, "outer", the layer's own input, and the block adds its skip.

  The backward pass keeps the arguments alone; pairs, `[T,K,K,M]`, are made again.

  Args:
    params: `scale_LD`, `down_LDM`, `mix_LMPM`, `up_LMD`; L rounds, M width of messages,
      P 4, or 2 without gates.
    y_TKD: outputs of the chosen experts, float; dropped ones are zero.
    plan: the routing weights, and what was dropped.
    x_TD: the layer's input, read with residual="outer".
    residual_TD: the skip connection's, read with residual="absorbed".
    activation: of the edges, elementwise.
    gated: False leaves the edges out: messages are `act(node [u_i, u_j])`.
    residual: "absorbed" or "outer".
    eps: of the norm.

  Keywords of `use` also: `d_message`, `num_rounds=2`.

  Returns:
    `[T,D]` in the dtype of the residual, or of y with "outer".
  """
  h_TD = x_TD if residual == "outer" else residual_TD
  assert h_TD is not None  # the layer has checked
  kept_TK = plan.kept.reshape(y_TKD.shape[:2])
  weight_TK = jnp.where(kept_TK, plan.routing.weight.reshape(kept_TK.shape), 0)

  @jax.checkpoint
  def aggregate(params, y_TKD, weight_TK, h_TD):
    dtype, narrow = wide(y_TKD, h_TD), y_TKD.dtype
    h_TD = h_TD.astype(dtype)
    out_TKD = y_TKD.astype(dtype) * weight_TK.astype(dtype)[..., None]
    K, rounds = y_TKD.shape[1], params["down_LDM"].shape[0]
    # The shares of h sum to h: added once, or they would round away from it.
    total_TD = h_TD + out_TKD.sum(1)
    node_TKD = out_TKD + (h_TD / K)[:, None]
    for at in range(rounds):
      scale_D, down_DM, mix_MPM, up_MD = (
        params[name][at] for name in ("scale_LD", "down_LDM", "mix_LMPM", "up_LMD")
      )
      power_TK1 = jnp.square(node_TKD).mean(-1, keepdims=True)
      normed_TKD = node_TKD * jax.lax.rsqrt(power_TK1 + eps) * scale_D.astype(dtype)
      u_TKM = normed_TKD.astype(narrow) @ down_DM.astype(narrow)
      parts_TKPM = jnp.einsum("TKM,MPN->TKPN", u_TKM, mix_MPM.astype(narrow))
      sums_TKM = _messages(parts_TKPM.astype(dtype), kept_TK, activation, gated)
      up_MD = up_MD.astype(narrow)
      if at == rounds - 1:
        return total_TD + (sums_TKM.sum(1).astype(narrow) @ up_MD).astype(dtype)
      more_TKD = (sums_TKM.astype(narrow) @ up_MD).astype(dtype)
      node_TKD += more_TKD
      total_TD += more_TKD.sum(1)
    return total_TD

  y_TD = aggregate(dict(params), y_TKD, weight_TK, h_TD)
  return y_TD.astype(y_TKD.dtype if residual == "outer" else h_TD.dtype)


def _messages(
  parts_TKPM: Array, kept_TK: Array, activation: Callable[[Array], Array], gated: bool
) -> Array:
  """What every node receives, `[T,K,M]`; zero for dropped ones."""

  @jax.checkpoint
  def summed(parts_TKPM):
    pair_TKKPM = [  # receiver, sender
      parts_TKPM[:, :, None, p] + parts_TKPM[:, None, :, p + 1]
      for p in range(0, parts_TKPM.shape[2], 2)
    ]
    message_TKKM = activation(pair_TKKPM[0])
    if gated:
      message_TKKM *= pair_TKKPM[1]
    both_TKK = kept_TK[:, :, None] & kept_TK[:, None]
    return jnp.where(both_TKK[..., None], message_TKKM, 0).sum(2)

  return summed(parts_TKPM)
