"""LIMoE: one tower for images and text, kept from taking sides by entropies."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, gates, initializers, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority
from jmoe.config import MoEConfig
from jmoe.use import use

IMAGE, TEXT = 0, 1  # values of `context.modality`


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  image_threshold: float,
  text_threshold: float,
  num_experts: int = 32,
  k: int = 1,
  capacity_factor: float = 1.05,
  group_size: int | str | None = None,
) -> MoEConfig:
  """A LIMoE layer; tokens of both modalities compete for the same slots.

  Mustafa et al. 2022, arXiv 2206.02770, section 2: local entropy of text tokens, global
  entropy of either modality above a threshold, with V-MoE's losses and the z-loss;
  batch-priority routing.  H/14: d_model 1280, d_ff 5120, 32 experts in 12 of 32 blocks.

  Not known here, so without defaults: the thresholds (nats: ln S asks that a modality
  use S experts) and the weights (`loss_weights`).  Capacity is V-MoE's.

  Args:
    d_model, d_ff, num_experts, k, capacity_factor, group_size: sizes.
    image_threshold, text_threshold: of the global entropies, nats.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.linear, initializer=use(initializers.fan_in)),
    router=use(routers.noisy_top_k, k=k, noise_std=1.0),
    group_size=group_size,
    priority=use(priority.by_confidence),
    capacity=use(capacity.by_factor, factor=capacity_factor, rule=capacity.vmoe),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True),
    losses=(
      use(losses.entropy_local, modality=TEXT),
      use(losses.entropy_global, modality=TEXT, threshold=text_threshold),
      use(losses.entropy_global, modality=IMAGE, threshold=image_threshold),
      use(losses.importance),
      use(losses.load),
      use(losses.router_z),
    ),
  )


@spelt
def loss_weights(
  *,
  text_local: float,
  text_global: float,
  image_global: float,
  importance: float,
  load: float,
  router_z: float,
) -> dict[str, float]:
  """Weights by the names in `Info.losses`."""
  return {
    f"entropy_local_m{TEXT}": text_local,
    f"entropy_global_m{TEXT}": text_global,
    f"entropy_global_m{IMAGE}": image_global,
    "importance": importance,
    "load": load,
    "router_z": router_z,
  }
