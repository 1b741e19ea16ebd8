"""A model whose repeated blocks stand one by one: the same function, other arrays."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

from jmoe.config import ModelConfig


def unrolled(config: ModelConfig) -> ModelConfig:
  """The model with every repeat as a segment of its own, so that none is a loop.

  A loop takes each layer's parameters out of their stack and puts their gradients into
  one: copies, which on an accelerator cost as much as reading and writing all of them
  three times.  Without a loop each layer has arrays of its own, and `Decoder.hidden`
  takes `before`; tracing and compiling grow with depth.

  Args:
    config: any model.

  Returns:
    A model whose parameters are those of `config`, `[L, ...]`, as L times `[1, ...]`.
  """
  ones = [(blocks, 1) for blocks, repeat in config.segments for _ in range(repeat)]
  return dataclasses.replace(config, segments=tuple(ones))
