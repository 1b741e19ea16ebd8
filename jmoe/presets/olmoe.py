"""OLMoE: eight of sixty-four small experts; its layer and its model."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, gates, initializers, losses, routers
from jmoe._spelling import spelt
from jmoe.config import Attention, BlockConfig, ModelConfig, MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.01, "router_z": 0.001}


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 64, k: int = 8) -> MoEConfig:
  """An OLMoE layer.

  Muennighoff et al. 2024, arXiv 2409.02060, section 2: d_model 2048, d_ff
  1024, every block; dropless SwiGLU experts, losses 0.01 and 0.001, truncated normal of
  0.02.  Weights are softmax values, not divided by their sum (released configuration).
  """
  start = use(initializers.truncated_normal, stddev=0.02)
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=start),
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff, initializer=start),
    losses=(use(losses.load_balance), use(losses.router_z)),
  )


def _decoder(num_layers: int) -> ModelConfig:
  block = BlockConfig(
    Attention(num_heads=16, qk_norm="all"), layer(d_model=2048, d_ff=1024)
  )
  return ModelConfig(
    vocab_size=50304,
    d_model=2048,
    segments=(((block,), num_layers),),
    tied=False,
    dtype="bfloat16",
  )


# Table 1 and the released configuration: 6.92 billion parameters, 1.28 active, norms of
# queries and keys over all heads, rotary base 10,000.
MODELS = {"1b-7b": _decoder(16)}
