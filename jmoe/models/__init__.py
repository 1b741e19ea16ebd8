"""Whole models as nnx modules, built from `ModelConfig`; none is named after a system.

blocks    attention, rotary positions, dense feed-forward, the block
decoder   embedding, segments of blocks, logits
encoder   tokens that see each other, norms after each sum
cache     one token at a time
by_name   a model as arrays by dotted name
cross_entropy  the loss, without the logits of all tokens
over_mesh  activations and the loss, split over a mesh
dropless  the same model without capacities
unrolled  the same model without loops over layers
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.models.blocks import Block, FeedForward, SelfAttention, rotary
from jmoe.models.decoder import Decoder
from jmoe.models.encoder import Encoder, EncoderConfig
from jmoe.models.cache import Cache, empty_cache, extend
from jmoe.models.cross_entropy import cross_entropy
from jmoe.models.dropless import dropless
from jmoe.models.unrolled import unrolled

__all__ = [
  "Block",
  "Cache",
  "Decoder",
  "Encoder",
  "EncoderConfig",
  "FeedForward",
  "SelfAttention",
  "cross_entropy",
  "dropless",
  "empty_cache",
  "extend",
  "rotary",
  "unrolled",
]
