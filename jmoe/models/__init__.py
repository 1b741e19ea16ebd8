"""Whole models as nnx modules, built from `ModelConfig`; none is named after a system.

blocks    attention, rotary positions, dense feed-forward, the block
decoder   embedding, segments of blocks, logits
cache     one token at a time
dropless  the same model without capacities
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.models.blocks import Block, FeedForward, SelfAttention, rotary
from jmoe.models.decoder import Decoder
from jmoe.models.cache import Cache, empty_cache, extend
from jmoe.models.dropless import dropless

__all__ = [
  "Block",
  "Cache",
  "Decoder",
  "FeedForward",
  "SelfAttention",
  "dropless",
  "empty_cache",
  "extend",
  "rotary",
]
