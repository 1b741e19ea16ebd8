"""MegaBlocks' dropless layer: every token is served."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.1}  # the library's default


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 64, k: int = 1) -> MoEConfig:
  """A dropless layer.

  Gale et al. 2022, arXiv 2211.15841, 64 experts, top-1; XS d_model
  512, d_ff 2048; Small 768, 3072; Medium 1024, 4096; every block.

  From its code: softmax weights as they are; GELU MLP. The output bias that its experts
  share is left out.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    dispatch=use(dispatch.sort),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu),
    losses=(use(losses.load_balance),),
  )
