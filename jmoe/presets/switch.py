"""Switch Transformer: one expert per token, cut at capacity."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, initializers, losses, noise, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance_group": 0.01}  # alpha, section 2.2


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 128,
  capacity_factor: float = 1.25,
  eval_capacity_factor: float = 2.0,
  group_size: int | str | None = None,
) -> MoEConfig:
  """A Switch layer.

  Fedus, Zoph, Shazeer 2021, arXiv 2101.03961: section 2.1 (top-1, weight p_i unscaled),
  2.2 (capacity, loss), 2.4 (float32 routing, initial scale 0.1), appendix F (jitter of
  the gate's input, in training).  Table 9: Base d_model 768, d_ff 2048, 128 experts;
  Large 1024, 2816, 128; XXL 4096, 10240; C 2080, 6144, 2048 (XXL's printed 64 experts
  give half of its printed size, 128 give it).

  Left out by the paper, taken from its Mesh-TensorFlow code: a minimum of 4 slots,
  rounding down, evaluation factor 2.0, groups (1024 tokens; `group_size`).  Placement,
  every second block, and expert dropout in fine-tuning are the model's affair.  Base,
  Large and XXL may use GLU experts: replace `experts`.
  """
  small = use(initializers.fan_in, scale=0.1)
  return MoEConfig(
    d_model,
    num_experts,
    input_noise=use(noise.jitter, eps=0.01),
    gate=use(gates.linear, initializer=small),
    router=use(routers.top_k, k=1),
    group_size=group_size,
    capacity=use(
      capacity.by_factor,
      factor=capacity_factor,
      eval_factor=eval_capacity_factor,
      rule=capacity.mesh,
    ),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu, initializer=small),
    losses=(use(losses.load_balance, over="group"),),
  )
