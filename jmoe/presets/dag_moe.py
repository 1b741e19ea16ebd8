"""DAG-MoE: rounds of messages among a token's experts in place of their sum."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax
from jax import Array

from jmoe import aggregate, combine, dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.config import Attention, BlockConfig, ModelConfig, MoEConfig
from jmoe.use import use

# The paper balances as Switch does and has a z-loss; their weights are not in what
# could be read of it, and are those of OLMoE.
LOSS_WEIGHTS = {"load_balance": 0.01, "router_z": 0.001}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 32,
  k: int = 4,
  d_message: int | None = None,
  num_rounds: int = 2,
  activation: Callable[[Array], Array] = jax.nn.silu,
  gated: bool = True,
  residual: str = "absorbed",
) -> MoEConfig:
  """A DAG-MoE layer.

  Feng et al. 2026, arXiv 2606.01062, equations 6 to 12: SwiGLU experts, two rounds.
  d_message None is d_model // 4, to which the quoted parameter counts point (393K a
  layer at d_model 512).  Left out in what could be read: k, whether weights are divided
  by their sum (here not), capacity (here none), and which activation the edges have;
  for that and `residual` see `jmoe.aggregate.dag`.
  """
  messages = use(
    aggregate.dag,
    d_message=max(1, d_model // 4) if d_message is None else d_message,
    num_rounds=num_rounds,
    activation=activation,
    gated=gated,
    residual=residual,
  )
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    combine=use(combine.stack),
    aggregate=messages,
    losses=(use(losses.load_balance), use(losses.router_z)),
  )


def _decoder(num_layers: int, d_model: int, d_ff: int) -> ModelConfig:
  attention = Attention(num_heads=16, num_kv_heads=4, rope_theta=500_000.0)
  block = BlockConfig(attention, layer(d_model=d_model, d_ff=d_ff))
  return ModelConfig(
    vocab_size=128_256,
    d_model=d_model,
    segments=(((block,), num_layers),),
    tied=False,
    dtype="bfloat16",
  )


# The 699 million parameters that the paper's large model has; layers and widths are
# inferred from that number and Llama-3.1's vocabulary.
MODELS = {"large": _decoder(8, 1024, 512)}
