"""Parameters and FLOPs of a model, from its configuration; nothing is allocated.

A FLOP is one addition or multiplication of a matrix product: a weight that a token
meets costs two.  Norms, activations, softmax, rotary positions, embedding look-ups and
the sorting of a sparse layer are not counted.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.layer import param_shapes
from jmoe.use import Use, fact


class Parameters(NamedTuple):
  """Counts of scalars, embeddings included."""

  total: int
  active: int  # what a token meets: of the experts, k/E on average


def parameters(config: ModelConfig) -> Parameters:
  """Counts of the parameters of `jmoe.models.Decoder`.

  >>> from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
  >>> block = BlockConfig(Attention(num_heads=2), Dense(d_ff=8))
  >>> parameters(ModelConfig(10, 4, segments=(((block,), 3),)))
  Parameters(total=548, active=548)
  """
  d = config.d_model
  embeddings = d * config.vocab_size * (1 if config.tied else 2)
  total = float(embeddings + _norm(config.norm, d))
  active = total
  for block, repeat in _blocks(config):
    rest = _attention(block.attention, d) + 2 * _norm(block.norm, d)
    rest += _qk_norms(block.attention, d)
    some_total, some_active = _feed_forward(block.ff, d)
    total += repeat * (rest + some_total)
    active += repeat * (rest + some_active)
  return Parameters(round(total), round(active))


def flops_per_token(config: ModelConfig, *, seq: int) -> float:
  """FLOPs of a forward pass, per token; training costs three times as many.

  Attention is counted over the whole row, masked entries too, as Chowdhery et al. 2022
  (PaLM, arXiv:2204.02311, appendix B) do.

  Args:
    config: the model.
    seq: tokens of a row.
  """
  flops = 2.0 * config.d_model * config.vocab_size
  for block, repeat in _blocks(config):
    attention = block.attention
    width = attention.num_heads * _head_dim(attention, config.d_model)
    projections = 2 * _attention(attention, config.d_model)
    scores_and_values = 2 * 2 * seq * width
    one = projections + scores_and_values + feed_forward_flops(block.ff, config.d_model)
    flops += repeat * one
  return flops


def feed_forward_flops(ff: Dense | MoEConfig, d_model: int) -> float:
  """FLOPs of a dense or sparse feed-forward per token, in a forward pass.

  Raises:
    ValueError: the layer has no number of experts per token.
  """
  if isinstance(ff, Dense):
    return 2.0 * _feed_forward(ff, d_model)[1]
  shapes = param_shapes(ff)
  share = experts_per_token(ff) / ff.num_experts
  flops = 2.0 * share * _matrices(shapes["experts"], ndim=3)
  flops += 2.0 * _matrices(shapes.get("gate", {}), ndim=2)
  flops += 2.0 * _matrices(shapes.get("shared", {}), ndim=3)
  flops += 2.0 * _matrices(shapes.get("join", {}), ndim=2)
  macs = None if ff.aggregate is None else fact(ff.aggregate, "macs")
  if ff.aggregate is None or macs is None:
    return flops + 2.0 * _matrices(shapes.get("aggregate", {}), ndim=2)
  return flops + 2.0 * macs(ff.k, d_model, **ff.aggregate.kwargs)


def experts_per_token(ff: MoEConfig) -> float:
  """K, or for expert choice the number a token meets on average.

  Raises:
    ValueError: the router has neither.
  """
  if ff.k is not None:
    return float(ff.k)
  try:
    return float(ff.router.get("capacity_factor"))
  except KeyError:
    raise ValueError(
      f"router={ff.router.name} has no number of experts per token; cost counts token "
      "choice and expert choice."
    ) from None


def equal_active_flops(config: ModelConfig) -> ModelConfig:
  """The dense model of the same active FLOPs.

  Each sparse layer becomes a dense one of the same kind whose width is, up to rounding,
  K experts, the shared expert and the gate together.
  """

  def dense(block: BlockConfig) -> BlockConfig:
    if isinstance(block.ff, Dense):
      return block
    expert = _expert(block.ff)
    gated = getattr(expert.function, "matrices", 3) == 3
    one = 2.0 * config.d_model * (3 if gated else 2)
    width = round(feed_forward_flops(block.ff, config.d_model) / one)
    activation = expert.kwargs.get("activation", Dense.activation)
    return dataclasses.replace(block, ff=Dense(max(1, width), gated, activation))

  segments = tuple(
    (tuple(dense(block) for block in blocks), repeat)
    for blocks, repeat in config.segments
  )
  return dataclasses.replace(config, segments=segments)


def _blocks(config: ModelConfig) -> list[tuple[BlockConfig, int]]:
  return [(b, repeat) for blocks, repeat in config.segments for b in blocks]


def _expert(ff: MoEConfig) -> Use:
  """The experts' function, inside functions that wrap another."""
  expert = ff.experts
  while "base" in expert.kwargs:
    expert = expert.kwargs["base"]
  return expert


def _head_dim(attention: Attention, d_model: int) -> int:
  return attention.head_dim or d_model // attention.num_heads


def _attention(attention: Attention, d_model: int) -> int:
  heads = attention.num_heads
  kv_heads = attention.num_kv_heads or heads
  return d_model * _head_dim(attention, d_model) * 2 * (heads + kv_heads)


def _qk_norms(attention: Attention, d_model: int) -> int:
  if attention.qk_norm is None:
    return 0
  heads = attention.num_heads + (attention.num_kv_heads or attention.num_heads)
  return _head_dim(attention, d_model) * (2 if attention.qk_norm == "head" else heads)


def _norm(kind: str, d_model: int) -> int:
  return d_model if kind == "rms" else 2 * d_model


def _feed_forward(ff: Dense | MoEConfig, d_model: int) -> tuple[float, float]:
  """(total, active) parameters."""
  if isinstance(ff, Dense):
    count = (3 if ff.gated else 2) * d_model * ff.d_ff
    return count, count
  shapes = param_shapes(ff)
  total = _matrices(shapes, ndim=0)
  experts = _matrices(shapes["experts"], ndim=0)
  share = experts_per_token(ff) / ff.num_experts
  return total, total - experts + experts * share


def _matrices(tree: Any, *, ndim: int) -> int:
  """Scalars in arrays of at least `ndim` dimensions: leaves out biases and scales."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree) if x.ndim >= ndim)
