"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside a gated shared one."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, join, losses, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.001}  # released configurations


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  shared_d_ff: int,
  num_experts: int = 64,
  k: int = 8,
) -> MoEConfig:
  """A Qwen2-MoE layer.

  Yang et al. 2024, arXiv 2407.10671, section 2.2.2, and released configurations:
  57B-A14B d_model 3584, d_ff 2560, shared 20480, 64 experts, k 8; Qwen1.5-MoE-A2.7B
  2048, 1408, shared 5632, 60 experts, k 4; every block.  Weights are not divided by
  their sum; the shared expert is multiplied by sigmoid(x . g).

  Left out by the paper: all of this but the sizes (from the released model code).
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    shared=use(experts.glu, d_ff=shared_d_ff),
    join=use(join.sigmoid_gate),
    losses=(use(losses.load_balance),),
  )
