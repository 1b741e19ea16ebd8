"""Qwen3-MoE: eight of 128 experts, balanced over the global batch."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_mesh": 0.001}


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 128, k: int = 8) -> MoEConfig:
  """A Qwen3-MoE layer.

  Yang et al. 2025, arXiv 2505.09388, section 2, and released configurations: 30B-A3B
  d_model 2048, d_ff 768; 235B-A22B 4096, 1536; every block.  Weights are divided by
  their sum, there is no shared expert, and the loss pools the global batch (arXiv
  2501.11873): pass the layer the mesh `axes` that hold it.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    losses=(use(losses.load_balance, over="mesh"),),
  )
