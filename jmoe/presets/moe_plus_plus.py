"""MoE++: some experts cost nothing, and gates hear the layer before."""
# SPDX-License-Identifier: Apache-2.0

from jmoe import dispatch, experts, gates, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.01}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 12,
  k: int = 2,
  num_constant: int = 2,
  capacity_factor: float = 1.1,
  tau: float = 0.75,
) -> MoEConfig:
  """A MoE++ layer; pass it the logits of the one before as `previous_logits`.

  Jin et al. 2024, arXiv 2410.07348, section 3: the last experts are `num_constant`
  constants, a copy and a zero; the gate adds the previous layer's logits through a
  matrix; an ordinary expert has tau times the slots of a free one.  From the authors'
  code (`MoE++/moe_plus_plus_layer.py`): a two-layer tanh gate of 8 E units.

  Left out here: the weight tau of free experts in the loss; and two steps of the code,
  which zeroes the zero expert's weight before dividing by the sum and feeds experts
  twice their input.  Factor 1.1 and tau 0.75 are not verified.

  Args:
    d_model, d_ff, k: sizes.
    num_experts: all of them, free ones included.
    num_constant: constant experts.
    capacity_factor: of all slots together.
    tau: slots of an ordinary expert, by those of a free one.
  """
  free = num_constant + 2
  ordinary = num_experts - free
  even = num_experts / (tau * ordinary + free)
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.mlp, d_hidden=8 * num_experts, residual=True),
    router=use(routers.top_k, k=k),
    capacity=use(
      capacity.by_factor,
      factor=capacity_factor,
      per_expert=(tau * even,) * ordinary + (even,) * free,
    ),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.buckets),
    experts=use(
      experts.with_free,
      base=use(experts.glu, d_ff=d_ff),
      constant=num_constant,
      copy=1,
      zero=1,
    ),
    losses=(use(losses.load_balance),),
  )
