"""Llama-4: the weight multiplies the expert's input."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, routers, score
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}  # unpublished


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 16, k: int = 1) -> MoEConfig:
  """A Llama-4 layer: shared(x) + FFN_e(sigmoid(l_e) x).

  Meta 2025, github.com/meta-llama/llama-models (`models/llama4/moe.py`) and released
  configurations: Scout d_model 5120, d_ff 8192, 16 experts in every block; Maverick the
  same with 128 experts in every second.  The shared expert is as wide as a routed one.

  There is no paper; training losses are unpublished.  The published code selects by
  logit, here it is by score: the same unless a sigmoid saturates in float32.
  """
  return MoEConfig(
    d_model,
    num_experts,
    score=use(score.sigmoid),
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    scale="input",
    shared=use(experts.glu, d_ff=d_ff),
    losses=(),
  )
