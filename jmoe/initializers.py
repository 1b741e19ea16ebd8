"""How gates and experts start: `(key, shape, dtype, **kwargs) -> array`."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe._ranges import in_range
from jmoe.use import marked


def _check_stddev(config: Any, *, stddev: float = 0.02) -> None:
  del config
  in_range("truncated_normal: stddev", stddev)


def _check_scale(
  config: Any, *, scale: float = 1.0, num_layers: int | None = None
) -> None:
  del config, num_layers
  in_range("fan_in: scale", scale)


@marked(check=_check_stddev)
def truncated_normal(
  key: Array, shape: tuple[int, ...], dtype: Any, *, stddev: float = 0.02
) -> Array:
  """N(0, stddev^2), cut at two standard deviations (OLMoE, upcycled gates)."""
  return jax.nn.initializers.truncated_normal(stddev)(key, shape, dtype)


@marked(check=_check_scale)
def fan_in(
  key: Array,
  shape: tuple[int, ...],
  dtype: Any,
  *,
  scale: float = 1.0,
  num_layers: int | None = None,
) -> Array:
  """Truncated normal of variance `scale / fan_in`, fan-in being the last axis but one.

  Switch Transformer (arXiv 2101.03961, section 2.4) takes `scale=0.1`.  With
  `num_layers`, the standard deviation is divided by `sqrt(2 * num_layers)`, as for
  the output matrices of deep residual stacks.
  """
  depth = 1.0 if num_layers is None else 1.0 / (2 * num_layers)
  stddev = math.sqrt(scale * depth / shape[-2]) / 0.87962566103423978
  return jax.nn.initializers.truncated_normal(stddev)(key, shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """All zeros (Grok-1's gate); the order of ties then decides the routing."""
  del key
  return jnp.zeros(shape, dtype)


def same_for_all(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """`fan_in`, drawn once and given to every expert (V-MoE's pre-training)."""
  return jnp.broadcast_to(fan_in(key, shape[1:], dtype), shape)
