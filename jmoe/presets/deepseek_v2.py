"""DeepSeekMoE and DeepSeek-V2: fine experts, shared ones, few devices a token."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, losses, restrict, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_sequence": 0.003}  # alpha_1 of V2; V2-Lite: 0.001


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 160,
  k: int = 6,
  num_shared: int = 2,
  num_groups: int = 8,
  keep_groups: int = 3,
  scale: float = 16.0,
) -> MoEConfig:
  """A DeepSeek-V2 layer.

  DeepSeek-AI 2024, arXiv 2405.04434, section 2.2: softmax scores, the 3 best of 8
  expert groups by their best expert, top-6 of those, weights undivided; section 3.1.2:
  d_model 5120, d_ff 1536, 2 shared experts (one GLU of twice the width); all blocks but
  the first.  From the released model: weights times 16.

  Left out here: the device-level and communication losses (0.05 and 0.02) and the
  device budget that drops tokens in training.

  Args:
    d_model, d_ff, num_experts, k: sizes.
    num_shared: shared experts, each d_ff wide.
    num_groups: expert groups, one a device.
    keep_groups: how many of them a token may use.
    scale: of the weights.
  """
  return MoEConfig(
    d_model,
    num_experts,
    restrict=(
      use(restrict.expert_groups, num_groups=num_groups, keep=keep_groups, best=1),
    ),
    router=use(routers.top_k, k=k, scale=scale),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    shared=use(experts.glu, d_ff=num_shared * d_ff),
    losses=(use(losses.load_balance, over="sequence"),),
  )


@spelt
def lite_layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  k: int = 6,
  num_shared: int = 2,
) -> MoEConfig:
  """V2-Lite (appendix B) and DeepSeekMoE (arXiv 2401.06066): no groups, no scale.

  V2-Lite: d_model 2048, d_ff 1408; DeepSeekMoE-16B has the same layer.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    shared=use(experts.glu, d_ff=num_shared * d_ff),
    losses=(use(losses.load_balance, over="sequence"),),
  )
