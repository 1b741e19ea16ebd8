"""PR-MoE of DeepSpeed-MoE: a dense expert beside a chosen one, more of them deeper."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, join, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {"load_balance": 0.01}


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 128) -> MoEConfig:
  """A residual layer as the paper's text has it: MLP(x) + p_e FFN_e(x).

  Rajbhandari et al. 2022, arXiv 2201.05596, section 4.1.  The pyramid is more experts
  in later blocks: 350M is 10 layers of 32 and 2 of 64 (d_model 1024, d_ff 4096), 1.3B
  10 of 64 and 2 of 128 (2048, 8192); every second block.

  Left out by the paper, taken from DeepSpeed and its scripts: factors of 1, at least 4
  slots, random token selection, loss weight 0.01.  With that selection later tokens
  decide who is dropped: a causal model wants `ModelConfig(future_drops=True)`.
  """
  return _layer(d_model, d_ff, num_experts, use(join.add))


@spelt
def blended_layer(*, d_model: int, d_ff: int, num_experts: int = 128) -> MoEConfig:
  """The same as DeepSpeed ships it (`moe/layer.py`): both outputs weighed per token.

  y = w0 p_e FFN_e(x) + w1 MLP(x) with w = softmax(x A + b).
  """
  return _layer(d_model, d_ff, num_experts, use(join.blend))


def _layer(d_model: int, d_ff: int, num_experts: int, join: Use) -> MoEConfig:
  expert = use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True)
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=1),
    priority=use(priority.random),
    capacity=use(capacity.by_factor, factor=1.0, rule=capacity.deepspeed, minimum=4),
    dispatch=use(dispatch.buckets),
    experts=expert,
    shared=expert,
    join=join,
    losses=(use(losses.load_balance),),
  )
