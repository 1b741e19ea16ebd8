"""GLaM: GShard's routing with ungated experts beside gated dense layers."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_group": 0.01}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  group_size: int | str | None = None,
) -> MoEConfig:
  """A GLaM layer.

  Du et al. 2021, arXiv 2112.06905, section 4; table 4: 1.7B/64E d_model 2048, d_ff
  8192; 8B/64E 4096, 16384; 64B/64E 8192, 32768; every second block.

  Left out by the paper, taken from Praxis (`layers/glam.py`): GShard's loss and slots,
  every second choice kept, and experts of two matrices with ReLU.  Two matrices give
  the paper's 1.2T parameters; with the dense layers' three they do not come out.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_2, policy="all"),
    group_size=group_size,
    capacity=use(capacity.by_factor, factor=2.0, rule=capacity.lingvo),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu),
    losses=(use(losses.load_balance, choices="first", over="group"),),
  )
