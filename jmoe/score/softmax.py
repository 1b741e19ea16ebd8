"""Probabilities over experts."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array


def softmax(logits_TE: Array) -> Array:
  """Probabilities over experts; nearly every system.

  Args:
    logits_TE: f32[T,E].

  Returns:
    f32[T,E], a row sums to one.
  """
  return jax.nn.softmax(logits_TE)
