"""Whether a model can be built, called and updated; before anything is computed."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jmoe import _id_checks
from jmoe.config import ModelConfig, MoEConfig
from jmoe.use import shown


def model_config(config: Any) -> None:
  """Raises unless this is the configuration of a model."""
  if not isinstance(config, ModelConfig):
    raise TypeError(
      f"Decoder: config={shown(config)} is no ModelConfig; write ModelConfig("
      "vocab_size, d_model, segments=(((block,), repeat),))."
    )


def call(
  config: ModelConfig, tokens_BS: Any, segment_BS: Any, position_BS: Any, forced: Any
) -> None:
  """Raises unless a model can read these tokens.

  Args:
    config: of the model.
    tokens_BS: what was given; out of the vocabulary is found where it can be read.
    segment_BS, position_BS: None, or what was given.
    forced: None, or recorded choices of all sparse layers.
  """
  _integers("tokens", tokens_BS, "[B,S]")
  shape = tokens_BS.shape
  if len(shape) != 2 or math.prod(shape) == 0:
    raise ValueError(
      f"tokens have shape {shape}; expected [B,S] with at least one token, as "
      "tokens[None] for one row."
    )
  for name, array in (("segment", segment_BS), ("position", position_BS)):
    if array is None:
      continue
    _integers(name, array, str(shape))
    if array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}; expected that of tokens, {shape}."
      )
  _id_checks.within("tokens", tokens_BS, config.vocab_size, valid=segment_BS)
  if forced is not None:
    _forced(config, forced, math.prod(shape))


def update(config: ModelConfig, infos: Sequence[Any]) -> None:
  """Raises unless there is an Info for each sparse block of each segment."""
  num = sum(
    isinstance(b.ff, MoEConfig) for blocks, _ in config.segments for b in blocks
  )
  remedy = "pass all that a call of it returned, in order"
  if not isinstance(infos, Sequence):
    raise TypeError(
      f"update: infos={shown(infos)} for a model of {num} sparse blocks; {remedy}."
    )
  if len(infos) != num:
    raise ValueError(
      f"update: {len(infos)} infos for a model of {num} sparse blocks; {remedy}."
    )


def not_repeated(before: Any, repeat: int) -> None:
  """Raises if something is to happen before each block of a segment that is a loop."""
  if before is not None:
    raise ValueError(
      f"hidden: before={shown(before)} and a segment repeated {repeat} times; pass it "
      "to the model of jmoe.models.unrolled(config)."
    )


def _forced(config: ModelConfig, forced: Any, T: int) -> None:
  layers = [
    block.ff
    for blocks, repeat in config.segments
    for block in blocks * repeat
    if isinstance(block.ff, MoEConfig)
  ]
  expected = f"[{len(layers)}, {T}, K]"
  _integers("forced", forced, expected)
  by_token = all(layer.k == (forced.shape or (0,))[-1] for layer in layers)
  chosen = forced.ndim == 3 and forced.shape[1] == T and by_token
  # Expert choice records tokens, [L,G,E,C]: the layer says of what shape.
  own = forced.ndim == 4 and all(layer.k is None for layer in layers)
  if forced.shape[0:1] != (len(layers),) or not (chosen or own):
    ks = sorted({str(layer.k) for layer in layers})
    raise ValueError(
      f"forced has shape {forced.shape}; expected {expected}: sparse layers, tokens, "
      f"and K={' or '.join(ks) or 'none'} choices of each."
    )


def _integers(name: str, array: Any, expected: str) -> None:
  if not (hasattr(array, "shape") and hasattr(array, "dtype")):
    raise TypeError(f"{name}={shown(array)} is not an array; pass one of {expected}.")
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name} has dtype {array.dtype}; expected integers, so cast it.")
