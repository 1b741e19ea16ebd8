"""V-MoE: vision transformers whose experts are balanced by importance and load."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, initializers, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority as priorities
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {"importance": 0.005, "load": 0.005}  # half each of 0.01


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 32,
  k: int = 2,
  capacity_factor: float = 1.05,
  eval_capacity_factor: float | None = None,
  group_size: int | str | None = None,
  priority: Use = use(priorities.by_choice_rank),
) -> MoEConfig:
  """A V-MoE layer; batch-priority routing is `priority=use(priority.by_confidence)`.

  Riquelme et al. 2021, arXiv 2106.05974: section 2 (softmax of noisy logits, then
  top-k, weights as they are), appendix A.2 (losses), section 4.1 (batch priority).
  S: d_model 512, d_ff 2048; B 768, 3072; L 1024, 4096; H 1280, 5120; 32 experts, every
  second or the last n blocks.

  From the authors' code: slots in multiples of 4, groups of 8 images (`group_size`),
  factor 1.05, and experts that all start with the same weights.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=use(initializers.fan_in)),
    router=use(routers.noisy_top_k, k=k, noise_std=1.0),
    group_size=group_size,
    priority=priority,
    capacity=use(
      capacity.by_factor,
      factor=capacity_factor,
      eval_factor=eval_capacity_factor,
      rule=capacity.vmoe,
    ),
    dispatch=use(dispatch.buckets),
    experts=use(
      experts.mlp,
      d_ff=d_ff,
      activation=jax.nn.gelu,
      bias=True,
      initializer=use(initializers.same_for_all),
    ),
    losses=(use(losses.importance), use(losses.load)),
  )
