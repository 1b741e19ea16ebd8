"""Bytes as tokens, and two more: the begin and the end of a document."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np

BOS, EOS = 256, 257
VOCAB_SIZE = 258


def encode(text: bytes) -> np.ndarray:
  """i32[n+2] tokens of a document of n bytes, begin and end included."""
  inside = np.frombuffer(text, np.uint8).astype(np.int32)
  return np.concatenate([[BOS], inside, [EOS]]).astype(np.int32)


def decode(tokens: list[int]) -> str:
  """Text of tokens up to the end of a document; broken characters become U+FFFD."""
  tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
  return bytes(t for t in tokens if t < BOS).decode(errors="replace")
