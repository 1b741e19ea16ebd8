"""One token from logits: greedy, or at random under a temperature and a nucleus."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array


def draw(logits_BV: Array, key_B: Array, *, temperature: Array, top_p: Array) -> Array:
  """i32[B] a token of each row.

  Args:
    logits_BV: f32[B,V]; -inf is never drawn.
    key_B: a random key of each row, for this token alone.
    temperature: f32[] that logits are divided by; 0 takes the highest, and of equal
      ones the lowest id.
    top_p: f32[] see `nucleus`, which is of the probabilities under the temperature.
  """

  def at_random(logits_BV):
    # From the highest down, which is a number at any temperature.
    highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = (logits_BV - highest_B1) / temperature
    inside_BV = nucleus(jax.nn.softmax(logits_BV), top_p)
    logits_BV = jnp.where(inside_BV, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

  def greedy(logits_BV):
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

  # One program for both, of which one runs: greedy text does not pay for sorting.
  return jax.lax.cond(temperature > 0, at_random, greedy, logits_BV)


def nucleus(probability_BV: Array, p: Array) -> Array:
  """bool[B,V] the smallest set of the likeliest tokens that hold at least `p`.

  Holtzman et al. 2020 (arXiv 1904.09751), equation 2: tokens are taken from the most to
  the least probable, of equal ones the lower id first, for as long as those taken
  before hold less than `p` together.  The likeliest is always in, as is the one that
  reaches `p`; with p=1 all are, however sums are rounded.

  Args:
    probability_BV: f32[B,V], rows sum to one.
    p: f32[] in (0, 1].
  """
  order_BV = jnp.argsort(-probability_BV, axis=-1, stable=True)
  sorted_BV = jnp.take_along_axis(probability_BV, order_BV, axis=-1)
  before_BV = jnp.pad(jnp.cumsum(sorted_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
  taken_BV = (before_BV < p) | (p >= 1)
  place_BV = jnp.argsort(order_BV, axis=-1)
  return jnp.take_along_axis(taken_BV, place_BV, axis=-1)
