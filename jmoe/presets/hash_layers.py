"""Hash layers: the token id decides, once and for all."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}


@spelt
def layer(
  *, d_model: int, d_ff: int, vocab_size: int, num_experts: int = 64
) -> MoEConfig:
  """A hash layer.

  Roller et al. 2021, arXiv 2106.04426, section 3.1: expert = table[token id], weight 1,
  no loss. `init_state(config, params, key)` draws a table with equally many ids for
  each expert; `routers.hash_table(frequency=...)` makes the balanced one.  MultiHash is
  left out.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.none),
    router=use(routers.hashed, vocab_size=vocab_size),
    dispatch=use(dispatch.sort),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu, bias=True),
    losses=(),
  )
