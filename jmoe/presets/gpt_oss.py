"""gpt-oss: biases everywhere, clamped gated experts."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, gates, routers
from jmoe._spelling import spelt
from jmoe.assign import renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}  # unpublished


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 128, k: int = 4) -> MoEConfig:
  """A gpt-oss layer.

  OpenAI 2025, arXiv 2508.10925, section 2, and `gpt_oss/torch/model.py`: d_model 2880,
  d_ff 2880, every block; 120b has 128 experts, 20b 32.  A gate with bias, a softmax
  over the four chosen logits, experts with biases and the interleaved, clamped unit.

  The published code takes the softmax in the model's dtype; here it is float32.
  Training losses are unpublished.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, bias=True),
    router=use(routers.top_k, k=k),
    renormalise=use(renormalise.over_chosen),
    dispatch=use(dispatch.sort),
    experts=use(experts.clamped_glu, d_ff=d_ff),
    losses=(),
  )
