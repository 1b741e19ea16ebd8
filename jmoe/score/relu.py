"""Scores that switch experts off by themselves."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array


def relu(logits_TE: Array) -> Array:
  """Non-negative scores, zero for an expert that is off: ReMoE (arXiv 2412.14711).

  Args:
    logits_TE: f32[T,E].

  Returns:
    f32[T,E], each at least zero.
  """
  return jax.nn.relu(logits_TE)
