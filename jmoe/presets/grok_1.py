"""Grok-1: two of eight GEGLU experts, weights as they are."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, initializers, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}  # unpublished


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 8, k: int = 2) -> MoEConfig:
  """A Grok-1 layer.

  xAI 2024, github.com/xai-org/grok-1 (`model.py`, `run.py`): d_model 6144, d_ff 32768,
  every block; float32 router that starts at zero, so that ties decide at first;
  softmax, top-2, not divided by the sum; experts GELU(tanh)-gated without
  biases.  Training and its losses are unpublished.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=use(initializers.zeros)),
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff, activation=jax.nn.gelu),
    losses=(),
  )
