"""Multiplicative jitter on the gate's input (Switch)."""
# SPDX-License-Identifier: Apache-2.0

import jax
from jax import Array

from jmoe._ranges import in_range
from jmoe.noise._keys import per_token
from jmoe.types import Context, wide
from jmoe.use import marked


def _check(config, *, eps: float = 0.01) -> None:
  del config
  in_range("jitter: eps", eps, most=1)  # beyond it signs would change


@marked(check=_check, random=lambda train, **_: train)
def jitter(x: Array, *, context: Context, key: Array, eps: float = 0.01) -> Array:
  """`x * U(1 - eps, 1 + eps)`, elementwise, in at least float32.

  Switch Transformer (arXiv 2101.03961), appendix F.  It is given a copy that only the
  gate sees; some implementations change the experts' input too.

  Args:
    x: `[T, ...]`.
    context: `position` i32[T] is folded into the key.
    key: for all tokens.
    eps: half-width, 0 to 1.
  """
  dtype = wide(x)

  def draw(k: Array) -> Array:
    return jax.random.uniform(k, x.shape[1:], dtype, 1 - eps, 1 + eps)

  return x.astype(dtype) * per_token(draw, key, context, x.shape[0])
