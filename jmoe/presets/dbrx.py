"""DBRX: four of sixteen experts."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.05}


@spelt
def layer(*, d_model: int, d_ff: int, num_experts: int = 16, k: int = 4) -> MoEConfig:
  """A DBRX layer.

  Databricks 2024, github.com/databricks/dbrx and its released configuration: d_model
  6144, d_ff 10752, every block; softmax, top-4, divided by the L1 norm of the four;
  SwiGLU without biases; dropless; loss weight 0.05.  There is no paper; jitter of the
  input is an option that the release sets to 0.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_k, k=k),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.sort),
    experts=use(experts.glu, d_ff=d_ff),
    losses=(use(losses.load_balance),),
  )
