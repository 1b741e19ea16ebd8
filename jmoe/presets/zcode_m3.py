"""Z-Code M3: one expert per token; who finds a slot is random."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.01}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  capacity_factor: float = 1.0,
  eval_capacity_factor: float = 1.0,
) -> MoEConfig:
  """A Z-Code M3 layer.

  Kim et al. 2021, arXiv 2109.10465: random token selection; every second block.

  Left out by the paper, taken from DeepSpeed (`moe/sharded_moe.py`): the capacity rule,
  at least 4 slots, factors of 1, one flat batch for the loss, and that selection is
  random in evaluation too (in a causal decoder later tokens then decide who is
  dropped, which wants `ModelConfig(future_drops=True)`).  Its input jitter and its
  noise on the choice (`select_noise=use(noise.gumbel)`) are off by default there and
  here.  Sizes (d_model 1024, d_ff 4096) and ReLU are reconstructed.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=1),
    priority=use(priority.random),
    capacity=use(
      capacity.by_factor,
      factor=capacity_factor,
      eval_factor=eval_capacity_factor,
      rule=capacity.deepspeed,
      minimum=4,
    ),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu, bias=True),
    losses=(use(losses.load_balance),),
  )
