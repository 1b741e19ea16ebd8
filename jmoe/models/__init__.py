"""Whole models as nnx modules, built from `ModelConfig`; none is named after a system.

blocks    attention, rotary positions, dense feed-forward, the block
decoder   embedding, segments of blocks, logits
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.models.blocks import Block, FeedForward, SelfAttention, rotary
from jmoe.models.decoder import Decoder

__all__ = ["Block", "Decoder", "FeedForward", "SelfAttention", "rotary"]
