"""ST-MoE: top-2 GEGLU experts held stable by the router z-loss."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, initializers, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, renormalise as renormalises
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {"load_balance_group": 0.01, "router_z": 0.001}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  capacity_factor: float = 1.25,
  eval_capacity_factor: float = 2.0,
  group_size: int | str | None = None,
  renormalise: Use = use(renormalises.before_dropping),
) -> MoEConfig:
  """An ST-MoE layer.

  Zoph et al. 2022, arXiv 2202.08906: equation 5 and section 3 (z-loss, weight 0.001),
  section 5 (top-2, factor 1.25; 2.0 in evaluation).  L: d_model 1024, d_ff 2816, 32
  experts; 32B: 5120, 20480, 64 experts; every fourth block.  The extra dense layer
  after a sparse one is the block's affair.

  The authors' two codes differ: Mesh-TensorFlow divides weights by their sum and keeps
  a second choice with probability min(1, g2 / 0.2), in evaluation too, as here;
  Flaxformer keeps them all, unnormalised (`renormalise=use(never)`).  Slots are
  Flaxformer's, without k; both have a minimum of 4.
  """
  small = use(initializers.fan_in, scale=0.1)
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=small),
    router=use(routers.top_2, policy="random", eval_policy="random", threshold=0.2),
    group_size=group_size,
    capacity=use(
      capacity.by_factor,
      factor=capacity_factor,
      eval_factor=eval_capacity_factor,
      rule=capacity.flaxformer,
      minimum=4,
    ),
    renormalise=renormalise,
    dispatch=use(dispatch.buckets),
    experts=use(experts.glu, d_ff=d_ff, activation=jax.nn.gelu, initializer=small),
    losses=(
      use(losses.load_balance, choices="first", over="group"),
      use(losses.router_z),
    ),
  )
