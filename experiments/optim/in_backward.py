"""AdamW of a block as soon as its gradient exists, inside the backward pass.

The gradient of a whole model is as large as the model.  Where nothing is asked of all
gradients together (no norm to clip, no test that all are numbers), a block's update
needs its own alone: it is made before the backward pass goes on to the block before, so
that one block's gradient exists at a time.

  tap = functools.partial(updated_in_backward, adamw, scalars)
  params, x = tap(params, moments, x)        # before the block: changes nothing
  new = jax.grad(loss, (0, 1))(params, moments)   # new parameters and moments

The "gradient" of parameters and moments that have been tapped is their new value.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import wide


class AdamW(NamedTuple):
  """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; PyTorch's defaults."""

  learning_rate: float = 1e-4
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01

  def init(self, params: Any) -> Any:
    """(first, second) moments, zero, in the dtypes of the parameters."""
    return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

  def corrections(self, step: Array) -> Array:
    """f32[2]: what the moments are divided by at this step; the first step is 1."""
    betas = jnp.array([self.b1, self.b2], jnp.float32)
    return 1 - betas ** step.astype(jnp.float32)

  def update(self, grads: Any, params: Any, moments: Any, corrections: Array) -> Any:
    """(parameters, moments) one step later, each leaf by itself.

    Arithmetic is float32 or wider, whatever the arrays are stored in; each is rounded
    once, and the parameter moves by moments that are not rounded.
    """
    leaves, tree = jax.tree.flatten(params)
    each = [jax.tree.leaves(t) for t in (grads, *moments)]
    done = [self._one(corrections, *leaf) for leaf in zip(leaves, *each, strict=True)]
    p, m, v = (jax.tree.unflatten(tree, part) for part in zip(*done, strict=True))
    return p, (m, v)

  def _one(self, corrections, p, g, m, v):
    dtypes = p.dtype, m.dtype, v.dtype
    p, g, m, v = (x.astype(wide(p)) for x in (p, g, m, v))
    m = self.b1 * m + (1 - self.b1) * g
    v = self.b2 * v + (1 - self.b2) * jnp.square(g)
    first, second = corrections.astype(p.dtype)
    move = (m / first) / (jnp.sqrt(v / second) + self.eps)
    p = p - self.learning_rate * (move + self.weight_decay * p)
    return tuple(x.astype(dtype) for x, dtype in zip((p, m, v), dtypes, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def updated_in_backward(
  optimizer: AdamW, corrections: Array, params: Any, moments: Any, x: Array
) -> tuple[Any, Array]:
  """(params, x) as they are; backward, new values in place of gradients.

  Args:
    optimizer: hashable.
    corrections: of `optimizer.corrections`; no gradient.
    params: of one block, used nowhere else.
    moments: of these parameters.
    x: what the block reads beside them: its gradient is passed on after the update.
  """
  del optimizer, corrections, moments
  return params, x


def _forward(optimizer, corrections, params, moments, x):
  del optimizer
  return (params, x), (corrections, params, moments)


def _backward(optimizer, residual, cotangents):
  corrections, params, moments = residual
  # The barriers are what orders it: all uses of the old parameters before, so that they
  # are overwritten in place, and all of the blocks before this one after.
  grads, dx = jax.lax.optimization_barrier(cotangents)
  new = optimizer.update(grads, params, moments, corrections)
  (params, moments), dx = jax.lax.optimization_barrier((new, dx))
  return None, params, moments, dx


updated_in_backward.defvjp(_forward, _backward)
