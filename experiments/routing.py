"""What the routers of a model did: a small tree on the device, records on the host.

Layers of a segment are stacked, so a model has one `Stack` for each sparse block of
each segment; `layers` and `by_depth` unpack them into layers in order of depth.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.config import ModelConfig, MoEConfig
from jmoe.types import Info, Mixing, Plan, pytree


@pytree
class Stack:
  """Of the R layers of one stack."""

  load: Array  # i32[R,E]  demand before capacity
  entropy: Array  # f32[R]  of a token's scores, nats
  dropped: Mapping[str, Array]  # f32[R] each: share of assignments, by cause


def stacks(infos: Sequence[Info]) -> tuple[Stack, ...]:
  """The part of what a model reports that is worth a look now and then."""
  return tuple(Stack(i.load, i.entropy, dict(i.dropped)) for i in infos)


def layers(config: ModelConfig, found: Sequence[Stack]) -> list[dict[str, Any]]:
  """A record for each sparse layer in order of depth, ready for JSON.

  Returns:
    `{"name", "choices": k or None, "load": [E integers], "entropy": nats, "dropped":
    {cause: share}}` each.
  """
  host = jax.device_get([(s.load, s.entropy, dict(s.dropped)) for s in found])
  choices = [
    block.ff.k
    for blocks, _ in config.segments
    for block in blocks
    if isinstance(block.ff, MoEConfig)
  ]
  records = {}
  for k, depths, arrays in zip(choices, _depths(config), host, strict=True):
    load, entropy, dropped = arrays
    for n, depth in enumerate(depths):
      records[depth] = {
        "name": _name(depth),
        "choices": k,
        "load": load[n].tolist(),
        "entropy": float(entropy[n]),
        "dropped": {cause: float(share[n]) for cause, share in dropped.items()},
      }
  return [records[depth] for depth in sorted(records)]


def by_depth(config: ModelConfig, found: Sequence[Any]) -> list[tuple[str, np.ndarray]]:
  """(name, array) of each sparse layer in order of depth.

  Args:
    config: the model.
    found: `[R,...]` for each of its stacks.
  """
  arrays = {
    depth: np.asarray(stack)[n]
    for depths, stack in zip(_depths(config), found, strict=True)
    for n, depth in enumerate(depths)
  }
  return [(_name(depth), arrays[depth]) for depth in sorted(arrays)]


def load_by_domain(
  plan: Plan | Mixing, domain_T: Array, counts_T: Array, *, num_domains: int
) -> Array:
  """i32[domains,E]: the load of one layer, by the domain of the tokens that make it.

  Args:
    plan: of the layer.
    domain_T: i32[T] of each token.
    counts_T: bool[T] tokens to count; with all of them, domains sum to `Info.load`.
    num_domains: rows of the result.

  Raises:
    ValueError: a dense routing, which makes no choices, or more assignments than
      float32 can count.
  """
  if isinstance(plan, Mixing):
    raise ValueError(
      "load_by_domain: a soft router makes no choices to count; use a sparse one."
    )
  routing = plan.routing
  if routing.expert.shape[0] >= 2**24:
    raise ValueError(
      f"load_by_domain: {routing.expert.shape[0]} assignments in a batch; evaluate "
      "batches of less than 2**24."
    )
  counts_N = routing.queues & counts_T[routing.token]
  domain_N = jnp.where(counts_N, domain_T[routing.token], -1)  # -1: a row of zeros
  domain_ND = jax.nn.one_hot(domain_N, num_domains, dtype=jnp.float32)
  expert_NE = jax.nn.one_hot(routing.expert, routing.num_experts, dtype=jnp.float32)
  # A product instead of a scatter, exact in any precision: zeros and ones, and their
  # sums in float32.
  load_DE = jnp.einsum("nd,ne->de", domain_ND, expert_NE)
  return load_DE.astype(jnp.int32)


def _name(depth: int) -> str:
  return f"layer {depth}"


def _depths(config: ModelConfig) -> list[list[int]]:
  """The depths of the layers of each stack; dense layers count too."""
  found, first = [], 0
  for blocks, repeat in config.segments:
    for n, block in enumerate(blocks):
      if isinstance(block.ff, MoEConfig):
        found.append([first + n + len(blocks) * r for r in range(repeat)])
    first += len(blocks) * repeat
  return found
