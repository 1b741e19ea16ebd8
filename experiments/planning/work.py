"""FLOPs of a training step by kind, and sizes of its parts.

Counted as `jmoe.analysis.cost` counts; for a whole step of all devices.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.config import Run
from jmoe.analysis import cost
from jmoe.assign import capacity
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.layer import param_shapes
from jmoe.use import use


class Work(NamedTuple):
  """FLOPs by what reaches different shares of the peak."""

  products: float  # dense matrix products
  experts: float  # grouped matrix products, without padding
  attention: float  # scores and values
  again: float  # of all three, made again in the backward pass

  experts_again: float  # the part of `again` that is grouped

  @property
  def useful(self) -> float:
    return self.products + self.experts + self.attention

  def multiplied(self, filled: float) -> float:
    """Of all products, with rows of experts filled up to `filled` of what they are."""
    grouped = self.experts + self.experts_again
    return self.useful + self.again + (filled - 1) * grouped


def blocks(model: ModelConfig) -> Iterator[tuple[BlockConfig, int]]:
  """(a block, how often it is there), in order."""
  for some, repeat in model.segments:
    for block in some:
      yield block, repeat


def looped(model: ModelConfig) -> float:
  """The part of the layers that are in loops, whose arrays lie in stacks."""
  inside = sum(len(some) * repeat for some, repeat in model.segments if repeat > 1)
  return inside / max(1, model.num_layers)


def sparse_blocks(model: ModelConfig) -> list[tuple[MoEConfig, int]]:
  """(a sparse layer, how often it is there)."""
  return [(b.ff, n) for b, n in blocks(model) if isinstance(b.ff, MoEConfig)]


def head_dim(attention: Attention, d_model: int) -> int:
  """d of a head."""
  return attention.head_dim or d_model // attention.num_heads


def of(run: Run) -> Work:
  """FLOPs of a step: a forward pass, twice that for gradients, and what is made again.

  A block that keeps its input alone is made again whole; one that keeps named arrays
  is counted with those products that none of them spares.
  """
  model, tokens = run.model, run.data.batch * run.data.seq
  head = 2.0 * model.d_model * model.vocab_size
  scores = experts = hidden = again = 0.0
  rest = cost.flops_per_token(model, seq=run.data.seq) - head
  for block, repeat in blocks(model):
    attention = block.attention
    width = attention.num_heads * head_dim(attention, model.d_model)
    own = 4.0 * run.data.seq * width
    scores += repeat * own
    inside = 0.0
    if isinstance(block.ff, MoEConfig):
      inside = expert_flops(block.ff)
      experts += repeat * inside
      # The last product is not made again: nothing asks for what it gives.
      up = num_up(block.ff)
      hidden += repeat * inside * up / (up + 1)
  dense = rest - scores - experts
  remat, experts_again = model.remat, hidden if model.remat else 0.0
  if remat:
    again = dense + scores + experts_again
  if isinstance(remat, tuple):
    kept = {"projected": dense / 2, "attention": scores, "hidden": experts_again}
    again -= sum(kept.get(name, 0.0) for name in remat)
    experts_again = 0.0 if "hidden" in remat else experts_again
  return Work(
    3 * tokens * (dense + head), 3 * tokens * experts, 3 * tokens * scores,
    tokens * max(again, 0.0), tokens * experts_again,
  )  # fmt: skip


def slots(ff: MoEConfig, tokens: int, factor: float) -> int:
  """Slots of an expert in a group of tokens, by the layer's own rule if it has one.

  Args:
    ff: the layer.
    tokens: of the group.
    factor: over the mean, of a layer without capacity.
  """
  k = round(cost.experts_per_token(ff))
  rule = ff.capacity or use(capacity.by_factor, factor=factor)
  return int(np.max(capacity.of_group(rule, tokens, tokens, ff.num_experts, k, True)))


def expert_flops(ff: MoEConfig) -> float:
  """Of the routed experts, forward, per token."""
  matrices = sum(math.prod(x.shape) for x in _stacks(ff) if len(x.shape) >= 3)
  return 2.0 * matrices * cost.experts_per_token(ff) / ff.num_experts


def expert_params(ff: MoEConfig) -> int:
  """Scalars of all experts of a layer."""
  return sum(math.prod(x.shape) for x in _stacks(ff))


def expert_width(ff: MoEConfig) -> int:
  """F of an expert."""
  return max(
    (x.shape[1] for name, x in _named(ff) if name.endswith("down_EFD")), default=1
  )


def num_up(ff: MoEConfig) -> int:
  """Matrices into the hidden layer of an expert: two of a gated unit."""
  return max(1, sum(len(x.shape) >= 3 for x in _stacks(ff)) - 1)


def _named(ff: MoEConfig) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(param_shapes(ff)["experts"])
  return [(str(getattr(path[-1], "key", "")), x) for path, x in leaves]


def _stacks(ff: MoEConfig) -> list[Any]:
  return [x for _, x in _named(ff)]


def dense_width(ff: Dense | MoEConfig) -> int:
  """F of a dense feed-forward, or of a layer's shared expert; 0 without one."""
  if isinstance(ff, Dense):
    return ff.d_ff
  shared = param_shapes(ff).get("shared", {})
  leaves = jax.tree_util.tree_leaves_with_path(shared)
  return max(
    (x.shape[1] for path, x in leaves if "down_EFD" in str(path[-1])), default=0
  )


def one_sparse(model: ModelConfig) -> MoEConfig | None:
  """The sparse layer that there is most of."""
  found = sparse_blocks(model)
  return max(found, key=lambda pair: pair[1])[0] if found else None


def with_batch(run: Run, batch: int) -> Run:
  """The run with so many rows in a batch."""
  return dataclasses.replace(run, data=dataclasses.replace(run.data, batch=batch))
