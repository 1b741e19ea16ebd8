"""PanGu-Sigma: random routed experts; a domain's block, then a fixed table."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, restrict, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  vocab_size: int,
  num_domains: int,
  num_experts: int = 640,
) -> MoEConfig:
  """A layer of random routed experts (RRE); nothing about routing is learned.

  Ren et al. 2023, arXiv 2303.10845, section 3: `context.domain_id` picks a block of
  experts, a table drawn once per layer picks one of them by `context.token_id`; weight
  1, no loss, no drops.  Draw each layer's table with `init_state(config, params, key)`.
  Reconstructed sizes: d_model 5120, d_ff 20480, 640 experts in the last 8 of 40 blocks.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.none),
    restrict=(use(restrict.domain, num_domains=num_domains),),
    router=use(routers.hashed, vocab_size=vocab_size),
    dispatch=use(dispatch.sort),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True),
    losses=(),
  )
