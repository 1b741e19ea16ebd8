"""Expert choice: experts take their best tokens; for encoders."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  capacity_factor: float = 2.0,
  group_size: int | str | None = None,
) -> MoEConfig:
  """An expert-choice layer; not causal.

  Zhou et al. 2022, arXiv 2202.09368, section 3: softmax over experts, every expert
  takes T * capacity_factor / E tokens (factor 2), weights as they are, no loss.  Table
  1: 0.1B/64E d_model 768, d_ff 3072; 8B/64E 4096, 16384; every second block.

  Left out by the paper: rounding (here up; Praxis rounds down), and the experts'
  activation (GLaM's two matrices with ReLU).
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.expert_choice, capacity_factor=capacity_factor),
    group_size=group_size,
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu),
    losses=(),
  )
