"""Activations that a kernel can compute in registers, each with its derivative.

Kernels cannot trace any function, so that these are written out; a function that is not
here is computed outside of them.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jmoe.use import Use


def sigmoid(x: Array) -> Array:
  """`1 / (1 + exp(-x))`; a root is one instruction, an exact division many."""
  root = lax.rsqrt(1.0 + jnp.exp(-x))
  return root * root


def silu(x: Array) -> tuple[Array, Array]:
  """(x sigmoid(x), its derivative)."""
  gate = sigmoid(x)
  return x * gate, gate * (1.0 + x * (1.0 - gate))


def relu(x: Array) -> tuple[Array, Array]:
  """(max(x, 0), its derivative, zero at zero)."""
  return jnp.maximum(x, 0.0), jnp.where(x > 0.0, 1.0, 0.0)


def gelu(x: Array) -> tuple[Array, Array]:
  """The tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

  As `(1 + tanh(z)) / 2 = sigmoid(2 z)`: a chip's fast tanh would lose the tail, where
  the sum cancels.
  """
  c, d = 2 * math.sqrt(2 / math.pi), 0.044715
  gate = sigmoid(c * (x + d * x * x * x))
  return x * gate, gate + x * gate * (1.0 - gate) * c * (1.0 + 3 * d * x * x)


_KNOWN: dict[Any, Callable[[Array], tuple[Array, Array]]] = {
  jax.nn.silu: silu,
  jax.nn.swish: silu,
  jax.nn.relu: relu,
  jax.nn.gelu: gelu,  # whose default is the tanh form
}


def of(activation: Any) -> Callable[[Array], tuple[Array, Array]] | None:
  """The form for a kernel of a function, or None."""
  if isinstance(activation, Use):
    return None if activation.kwargs else of(activation.function)
  try:
    return _KNOWN.get(activation)
  except TypeError:  # not hashable
    return None
