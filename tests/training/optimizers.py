"""What tests of the optimizer share: parameters, gradients, updates."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import Optim
from tests.training.conftest import QUICK

KINDS = ("adamw", "adafactor", "muon")
EXPERT = "segments.0.0.moe.experts."
SHAPES = {
  "embed.embedding": (7, 4),
  "segments.0.0.attention.query.kernel": (2, 4, 4),
  "segments.0.0.ff_norm.scale": (2, 4),
  "segments.0.0.moe.gate.kernel_DE": (2, 4, 3),
  "segments.0.0.moe.shared.up_EDF": (2, 1, 4, 5),
  "segments.0.0.moe.shared.up_bias_EF": (2, 1, 5),
  EXPERT + "up_EDF": (2, 3, 4, 5),
  EXPERT + "up_bias_EF": (2, 3, 5),
}


def plain(**values) -> Optim:
  """Updates of size one, nothing clipped or decayed, unless said otherwise."""
  given = {"schedule": "constant", "clip": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
  return Optim(**({"learning_rate": 1.0} | given | values))


def draw(shapes, seed=0, dtype="float32"):
  """NumPy's, whose slices compile nothing."""
  random = np.random.default_rng(seed)
  dtype = jnp.dtype(dtype)
  return {n: random.normal(size=s).astype(dtype) for n, s in shapes.items()}


@functools.partial(jax.jit, static_argnames="optimizer", compiler_options=QUICK)
def moved(optimizer, params, grads):
  """All updates of several gradients, summed, and the last state."""

  def one(carry, grad):
    total, state = carry
    updates, state = optimizer.update(grad, state, params)
    return (jax.tree.map(jnp.add, total, updates), state), None

  # optax by itself, as a reference, mixes dtypes.
  with jax.numpy_dtype_promotion("standard"):
    start = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    return jax.lax.scan(one, start, stacked)[0]


@functools.partial(
  jax.jit, static_argnames=("optimizer", "times"), compiler_options=QUICK
)
def repeated(optimizer, params, grad, times):
  """Parameters, state and the last updates after one gradient many times."""

  def one(_, carry):
    params, state, _ = carry
    updates, state = optimizer.update(grad, state, params)
    with jax.numpy_dtype_promotion("standard"):
      return optax.apply_updates(params, updates), state, updates

  zeros = {n: jnp.zeros(x.shape) for n, x in params.items()}
  return jax.lax.fori_loop(0, times, one, (params, optimizer.init(params), zeros))
