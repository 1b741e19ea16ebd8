"""No row moves: all hidden units run, those of experts not chosen are zero (EMoE)."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Home, Plan
from jmoe.use import marked

_PLAIN = ("glu", "mlp")


def _check(config) -> None:
  used = config.experts
  if used.function.__module__ not in [f"jmoe.experts.{name}" for name in _PLAIN]:
    raise ValueError(
      f"dispatch=mask() with experts={used!r}: it computes experts.mlp and experts.glu "
      "itself; use dispatch.sort for others."
    )
  if unread := [n for n in ("matmul", "keep", "pieces") if n in used.kwargs]:
    raise ValueError(
      f"dispatch=mask() with experts={used!r}: {unread[0]} is of grouped products, "
      "which it has none of; leave it out, or use dispatch.sort."
    )
  if config.k is None or config.scale == "input":
    raise ValueError(
      f"dispatch=mask() with router={config.router.name}, scale={config.scale!r}; give "
      "a router with a fixed k and scale='output', or use dispatch.sort."
    )


@marked(dropless=None, in_place=True, check=_check)
def mask(x_TD: Array, plan: Plan, experts: Any, home: Home) -> Array:
  """The dense feed-forward of all experts, hidden units times their expert's weight.

  Qiu, Huang, Fu 2024 (EMoE, arXiv 2310.10908), the form of its Llama code.  The FLOPs
  are those of all experts, so it is for a few experts of a dense model cut into groups
  (`surgery.cluster`), where k/E is a half or a quarter: plain products, no sorts, and
  it stays so under `vmap`.  Equal to the other strategies to rounding.

  Args:
    x_TD: activations.
    plan: of a router with a fixed k; what it drops weighs zero.
    experts: the layer's `experts.mlp` or `experts.glu` with their parameters.
    home: how outputs come home; for each choice by itself the last product is made k
      times.

  Returns:
    `[T,D]` or `[T,K,D]` in x's dtype.
  """
  routing = plan.routing
  T, E = routing.num_tokens, routing.num_experts
  params = {n: w.astype(x_TD.dtype) for n, w in experts.params.items()}
  activation = experts.use.get("activation")

  hit_TKE = routing.expert.reshape(T, -1, 1) == jnp.arange(E, dtype=jnp.int32)
  weight_TKE = jnp.where(hit_TKE, home.weight.reshape(T, -1, 1), 0)

  def first(name: str) -> Array:
    y_TEF = jnp.einsum("td,edf->tef", x_TD, params[f"{name}_EDF"])
    bias_EF = params.get(f"{name}_bias_EF")
    return y_TEF if bias_EF is None else y_TEF + bias_EF

  with jax.named_scope("experts"):
    if experts.use.name == "glu":
      hidden_TEF = activation(first("gate")) * first("up")
    else:
      hidden_TEF = activation(first("up"))

    def out(weight_TE: Array) -> Array:
      weight_TE = weight_TE.astype(x_TD.dtype)
      weighed_TEF = hidden_TEF * weight_TE[:, :, None]
      y_TD = jnp.einsum("tef,efd->td", weighed_TEF, params["down_EFD"])
      bias_ED = params.get("down_bias_ED")
      return y_TD if bias_ED is None else y_TD + weight_TE @ bias_ED

    if home.sums:
      return out(jnp.sum(weight_TKE, axis=1))
    each = jax.checkpoint(out)  # keeps one hidden array, not a weighed one a choice
    choices = range(weight_TKE.shape[1])
    return jnp.stack([each(weight_TKE[:, k]) for k in choices], axis=1)
