"""Large arrays of a sparse layer on Hopper made in pieces: the same layer."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.kernels import devices
from jmoe.use import use
from tests.kernels.hopper_cases import error, interpreted, on_cpu

T, E, D, F = 200, 5, 256, 256
# Tokens of experts 0, 1, 3; all go to 2, whose two blocks lie on both sides of the cut
# of eight blocks; none goes to 4.
LOADS = (130, 10, 60)


def config(function=jmoe.experts.glu, **keywords):
  base = jmoe.simple(D, F, num_experts=E, k=2)
  return dataclasses.replace(base, experts=use(function, d_ff=F, **keywords))


def grads(config):
  first = jnp.repeat(jnp.asarray((0, 1, 3)), jnp.asarray(LOADS), total_repeat_length=T)
  forced = jnp.stack([first, jnp.full(T, 2)], axis=1)

  def call(params, x):
    def loss(params, x):
      y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, found

  return call


def operands(config, dtype=jnp.bfloat16):
  params = jmoe.moe_init(jax.random.key(0), config)
  experts = jax.tree.map(lambda a: a.astype(dtype), params["experts"])
  for n, (name, a) in enumerate(experts.items()):  # biases start at zero
    noise = jax.random.normal(jax.random.key(n + 2), a.shape, dtype)
    experts[name] = a + 0.1 * noise if "bias" in name else a
  x = jax.random.normal(jax.random.key(1), (T, D), dtype)
  return {**params, "experts": experts}, x


CASES = {
  "glu": {},
  "glu, made anew": {"keep": "inputs"},
  "mlp with biases, rows kept": {
    "function": jmoe.experts.mlp,
    "keep": "rows",
    "bias": True,
  },
}


@on_cpu
@pytest.mark.parametrize("name", CASES)
def test_an_interpreted_layer_in_pieces_is_the_same(name, monkeypatch):
  """Values and all gradients, bit by bit but for sums of a weight's gradient."""
  from jmoe.kernels import hopper, permute_rows

  monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
  monkeypatch.setattr(permute_rows.api, "_served", lambda rows: False)
  found = {}
  for pieces in (1, 2):
    made = config(pieces=pieces, **CASES[name])
    given = operands(made)
    with devices.as_if("hopper"), interpreted():
      found[pieces] = jax.jit(grads(made))(*given)
  with devices.as_if("cpu"):
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
    expected = jax.jit(grads(made))(*wide)
  leaves = map(jax.tree.leaves, (found[1], found[2], expected))
  for whole, pieces, other in zip(*leaves, strict=True):
    assert error(pieces, np.asarray(other, np.float64)) < 2e-2
    assert error(pieces, np.asarray(whole, np.float64)) < 1e-3
