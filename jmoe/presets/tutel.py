"""Tutel and SwinV2-MoE: any k, any capacity factor, linear or cosine gate."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, losses, noise, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority as priorities, renormalise
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {"load_balance": 0.01}  # SwinV2-MoE


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 32,
  k: int = 1,
  capacity_factor: float | None = 1.25,
  gate: Use = use(gates.linear),
  noise_std: float | None = None,
  priority: Use = use(priorities.by_choice_rank),
) -> MoEConfig:
  """A Tutel layer; `gate=use(gates.cosine)` is its cosine router.

  Hwang et al. 2022, arXiv 2206.03382: k and factor may change from step to step (build
  another configuration); SwinV2-MoE has 32 experts, k 1, factor 1.25.  Its factor 0,
  exact maximum load, is `capacity_factor=None`, dropless here; a negative one drops
  what its absolute value does.

  From its code: slots are k * floor(factor * ceil(T/E)); with k > 1 weights are divided
  by their sum before capacity; optional noise N(0, (noise_std/E)^2) on the logits in
  training; the loss counts first choices.  Alignment of slots to the number of devices
  is left out: it would make drops depend on the mesh.
  """
  limited = capacity_factor is not None
  return MoEConfig(
    d_model,
    num_experts,
    gate=gate,
    logit_noise=None if noise_std is None else use(noise.gaussian, std=noise_std),
    router=use(routers.top_k, k=k),
    priority=priority,
    capacity=use(capacity.by_factor, factor=capacity_factor, rule=capacity.tutel)
    if limited
    else None,
    renormalise=use(renormalise.before_dropping if k > 1 else renormalise.never),
    dispatch=use(dispatch.buckets if limited else dispatch.sort),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True),
    losses=(use(losses.load_balance, choices="first"),),
  )
