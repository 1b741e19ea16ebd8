"""Independent scores, one sigmoid an expert."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array


def sigmoid(logits_TE: Array) -> Array:
  """Independent scores in (0, 1): DeepSeek-V3 (arXiv 2412.19437), equation 15.

  Args:
    logits_TE: f32[T,E].

  Returns:
    f32[T,E], each in (0, 1).
  """
  return jax.nn.sigmoid(logits_TE)
