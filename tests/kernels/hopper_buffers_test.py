"""Buffers of rows by Hopper's kernels, interpreted: several, and half empty ones."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe._carrying import Experts
from jmoe.dispatch import carry
from jmoe.dispatch.layout import ragged
from jmoe.dispatch.requeue import requeue
from jmoe.kernels import devices
from jmoe.types import Home
from jmoe.use import use
from tests.kernels.hopper_cases import as_hopper as as_hopper, error, on_cpu
from tests.kernels.hopper_layer_test import LAYERS, moved, narrow

IN_PIECES = dataclasses.replace(
  jmoe.simple(256, 256, num_experts=4, k=2),
  experts=use(jmoe.experts.glu, d_ff=256, bias=True, pieces=2),
)


@on_cpu
@pytest.mark.parametrize("config, models", [
  (LAYERS["glu with biases"], 2),
  (LAYERS["mlp with biases, made anew"], 1),
  (IN_PIECES, 1),
], ids=["two models", "made anew", "in pieces"])  # fmt: skip
def test_blocks_in_which_no_expert_has_rows_are_not_read(config, models, as_hopper):
  """NaN stands there, in half of the buffer: two of four experts get all tokens."""
  drawn = [jmoe.moe_init(key, config) for key in jax.random.split(jax.random.key(0), 2)]
  params = [jax.tree.map(moved, narrow(one)) for one in drawn]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves[:models]), *params)
  x = jax.random.normal(jax.random.key(1), (models, 60, config.d_model), jnp.bfloat16)
  forced = jnp.stack([jnp.tile(jnp.array([n, n + 1]), (60, 1)) for n in range(models)])

  def grads(params, x, forced):
    def loss(params, x):
      y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
      return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  found = jax.jit(jax.vmap(grads))(stacked, x, forced)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), (stacked, x))
  with devices.as_if("cpu"):
    expected = jax.jit(jax.vmap(grads))(*wide, forced)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-2


@on_cpu
@pytest.mark.parametrize("keep, bias, travels, sums", [
  ("hidden", False, True, True), ("hidden", True, False, False),
  ("inputs", True, True, False), ("inputs", False, False, True),
  ("rows", False, True, True),
])  # fmt: skip
def test_tokens_in_several_buffers_are_those_of_one(
  keep, bias, travels, sums, as_hopper
):
  """Values and gradients; of no token of the first buffer is the last expert's."""
  E, k, D, sizes = 4, 2, 128, (40, 150)
  experts = use(jmoe.experts.glu, d_ff=128, keep=keep, bias=bias)
  keys = jax.random.split(jax.random.key(0), 5)
  params = experts.init(keys[0], d_model=D, num_experts=E, dtype=jnp.bfloat16)
  params = jax.tree.map(moved, params)
  x, dy = (jax.random.normal(key, (sum(sizes), D), jnp.bfloat16) for key in keys[1:3])
  weight = jax.random.uniform(keys[3], (sum(sizes), k)) + 0.5
  drawn = jax.random.uniform(keys[4], (sum(sizes), E)).at[: sizes[0], -1].set(-1)
  chosen = jax.lax.top_k(drawn, k)[1].astype(jnp.int32)

  def brought(sizes, params, x, weight):
    ends = np.cumsum(sizes)
    tokens, layouts, ways = [], [], []
    for begin, end in zip((0, *ends), ends, strict=False):
      token = jnp.repeat(jnp.arange(end - begin, dtype=jnp.int32), k)
      plan = requeue(chosen[begin:end].reshape(-1), token, E, int(end - begin), k)
      layouts.append(ragged(plan, alignment=128))
      ways.append(Home(weight[begin:end].reshape(-1)))
      tokens.append(x[begin:end])
    served = Experts(experts, params)
    if not sums:  # a function around them: weights come on the way home
      served = Around(served)
    found = carry.through_each(tokens, layouts, served, ways, travels=travels)
    return jnp.concatenate(found)

  def grads(sizes, *operands):
    y, pull = jax.vjp(functools.partial(brought, sizes), *operands)
    return y, pull(dy.astype(y.dtype))

  found = jax.jit(functools.partial(grads, sizes))(params, x, weight)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, weight))
  with devices.as_if("cpu"):
    expected = jax.jit(functools.partial(grads, (sum(sizes),)))(*wide)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-2


class Around:
  """A function around experts: it says nothing of them but that it takes buffers."""

  def __init__(self, experts):
    self.each, self._experts = experts.each, experts

  def __call__(self, rows):
    return self._experts(rows)
