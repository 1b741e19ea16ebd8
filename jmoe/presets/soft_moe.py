"""Soft MoE: slots are averages of an image's tokens; for encoders."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, routers
from jmoe._spelling import spelt
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS: dict[str, float] = {}


@spelt
def layer(
  *, d_model: int, d_ff: int, num_experts: int = 128, slots_per_expert: int = 1
) -> MoEConfig:
  """A Soft MoE layer; not causal, one group per row of the context (image).

  Puigcerver et al. 2023, arXiv 2308.00951, section 2: equations 1 to 3, inputs and
  slots normalised (2.3), one slot per expert; Huge/14: d_model 1280, d_ff 5120, 128
  experts in the second half of the blocks.

  From the authors' code: slots start as Lecun normal, the scale at 1; ViT's GELU MLP
  with biases.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.slots, slots_per_expert=slots_per_expert),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True),
    losses=(),
  )
