"""Mixtral 8x7B and 8x22B: two SwiGLU experts, a softmax over their logits."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import renormalise
from jmoe.config import Attention, BlockConfig, ModelConfig, MoEConfig
from jmoe.use import use

# The paper has no training losses.  The released 8x7B configuration's coefficient;
# there it multiplies a loss pooled over layers that is k, not 1, at balance.
LOSS_WEIGHTS = {"load_balance": 0.02}


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 8, k: int = 2) -> MoEConfig:
  """A Mixtral layer.

  Jiang et al. 2024, arXiv 2401.04088, section 2.1: G(x) = softmax(top-k(x W)), SwiGLU
  experts, no biases, nothing dropped.  Table 1: 8x7B d_model 4096, d_ff 14336; 8x22B
  (configuration) 6144, 16384; every block.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    renormalise=use(renormalise.over_chosen),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    losses=(use(losses.load_balance),),
  )


def _decoder(
  num_layers: int, d_model: int, d_ff: int, num_heads: int, vocab_size: int
) -> ModelConfig:
  attention = Attention(num_heads, num_kv_heads=8, rope_theta=1e6)
  block = BlockConfig(attention, layer(d_model=d_model, d_ff=d_ff))
  return ModelConfig(
    vocab_size,
    d_model,
    segments=(((block,), num_layers),),
    tied=False,
    dtype="bfloat16",
  )


# Table 1 and the released configurations: 46.7 billion parameters, 12.9 active; 140.6
# and 39.1.
MODELS = {
  "8x7b": _decoder(32, 4096, 14336, 32, 32000),
  "8x22b": _decoder(56, 6144, 16384, 48, 32768),
}
