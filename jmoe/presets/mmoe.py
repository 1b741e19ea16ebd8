"""MMoE: all experts for every token, and a gate for every task."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import aggregate, combine, dispatch, experts, gates, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}


@spelt
def layer(
  *, d_model: int, d_ff: int, num_tasks: int, num_experts: int = 8
) -> MoEConfig:
  """A multi-gate layer: its output is `[T, num_tasks, d_model]`.

  Ma et al. 2018, KDD, equations 6 and 7; its synthetic study uses 8 experts.  Dense:
  nothing is chosen, dropped or balanced.

  The paper's expert is one ReLU layer whose width is the output's; here it is an MLP
  back to d_model, so that layers stack.  YouTube's gate dropout (RecSys 2019) is left
  out.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.none),
    router=use(routers.every_expert),
    dispatch=use(dispatch.sort),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu, bias=True),
    combine=use(combine.stack),
    aggregate=use(aggregate.per_task, num_tasks=num_tasks),
    losses=(),
  )
