"""Balance without a loss: a bias per expert, moved after each optimizer step.

The bias is added to the scores that select, never to those that weigh; it lives in
`State`, outside the parameters, the gradient and the weight decay.
"""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
from jax import Array

from jmoe._ranges import in_range
from jmoe.use import marked


def _check(config, *, rate: float = 1e-3) -> None:
  del config
  in_range("update: rate", rate)


@marked(check=_check)
def update(bias_E: Array, load_E: Array, *, rate: float = 1e-3) -> Array:
  """f32[..., E]: the bias, up by `rate` for experts below the mean load, down above it.

  b_e + rate * sign(mean(load) - load_e); an expert exactly at the mean keeps its bias.

  Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv
  2412.19437, section 2.1.2 (rate 0.001, and 0 for its last 500B tokens).

  >>> print(update(jnp.zeros(3), jnp.array([6, 3, 0]), rate=0.5))
  [-0.5  0.   0.5]

  Args:
    bias_E: f32[E], or `[L,E]` for stacked layers.
    load_E: i32[E], `Info.load`: demand of the whole batch, summed over all devices.
    rate: how far one update moves a bias.
  """
  # Integers first: equal loads then stay equal however large they are.
  above_E = (load_E - load_E.min(-1, keepdims=True)).astype(jnp.float32)
  step_E = jnp.sign(above_E.mean(-1, keepdims=True) - above_E)
  return bias_E.astype(jnp.float32) + rate * step_E
