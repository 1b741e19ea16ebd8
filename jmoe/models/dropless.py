"""A model without its capacities: the same parameters, and nothing is dropped."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

from jmoe import dispatch
from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.use import fact, use


def dropless(config: ModelConfig) -> ModelConfig:
  """The model in which every choice of an expert is kept; equal if it was so already.

  Which choices find a slot depends on the other tokens of a call: a limit balances
  training, but the same text read whole, token by token, or beside other texts then
  gives different logits.  Choices, weights, parameters and state stay as they are; of a
  text in which nothing was dropped, so do the logits.

  Args:
    config: of the trained model.

  Returns:
    The model with `capacity=None` and `max_rows=None` in every sparse layer,
    `dispatch.sort` where the layer's dispatch needs a capacity, and no `future_drops`.
  """
  segments = tuple(
    (tuple(_block(block) for block in blocks), repeat)
    for blocks, repeat in config.segments
  )
  return dataclasses.replace(config, segments=segments, future_drops=False)


def _block(block: BlockConfig) -> BlockConfig:
  ff = block.ff
  if not isinstance(ff, MoEConfig) or ff.capacity is ff.max_rows is None:
    return block
  carrier = ff.dispatch if fact(ff.dispatch, "dropless") else use(dispatch.sort)
  ff = dataclasses.replace(ff, capacity=None, max_rows=None, dispatch=carrier)
  return dataclasses.replace(block, ff=ff)
