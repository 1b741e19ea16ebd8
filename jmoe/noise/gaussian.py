"""Additive normal noise on logits (V-MoE, Tutel)."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array

from jmoe._ranges import in_range
from jmoe.noise._keys import per_token
from jmoe.types import Context
from jmoe.use import marked


def _check(config, *, std: float = 1.0) -> None:
  del config
  in_range("gaussian: std", std)


@marked(check=_check, random=lambda train, **_: train)
def gaussian(x: Array, *, context: Context, key: Array, std: float = 1.0) -> Array:
  """`x + N(0, (std / E)^2)`.

  V-MoE (arXiv 2106.05974), section 2.2, with `std=1`.

  Args:
    x: f32[T,E] logits.
    context: `position` i32[T] is folded into the key.
    key: for all tokens.
    std: standard deviation, times E.
  """

  def draw(k: Array) -> Array:
    return jax.random.normal(k, x.shape[1:], x.dtype)

  return x + (std / x.shape[-1]) * per_token(draw, key, context, x.shape[0])
