"""Where the memory of a step goes, by arithmetic and shapes: nothing is computed.

What a block keeps is read off the shapes that its backward pass asks for, with Hopper's
kernels and layout, on whatever machine this runs.  GB are 10^9 bytes.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.olmoe_step import training
from experiments.benchmarks.olmoe_step.size import Size
from jmoe.kernels import devices
from jmoe.models.cross_entropy import default_chunk

BLOCK = devices.HOPPER_BLOCK


def shown(size: Size, keep: str, *, loop: bool, chunk: int | None) -> dict[str, float]:
  """Prints the budget of a setting and returns it, in GB."""
  _, like = training.shapes(training.config(size, keep, loop=loop))
  parameters = _bytes(like)
  kept = kept_by_a_block(size, keep)
  rows = size.tokens * size.k + (BLOCK - 1) * min(size.experts, size.tokens * size.k)
  wide, narrow = 2 * rows * size.d_model, 2 * rows * size.d_ff
  block = _bytes({n: x for n, x in like.items() if n.startswith("segments.0.")})
  chunk = min(chunk or default_chunk(size.vocab), size.tokens)
  head = 2 * size.d_model * size.vocab
  found = {
    "parameters": parameters,
    "moments": 2 * parameters,
    "gradients": parameters if loop else block + 2 * head,
    "kept for the backward pass": size.layers * kept,
    # x, y and their gradients by rows of experts; both hidden arrays, the activation,
    # and the gradients of both.
    "a block at work": 4 * wide + 5 * narrow,
    # Of a chunk: logits, their gradient; of all: the matrix's gradient in float32.
    "the loss at work": 6 * chunk * size.vocab + 2 * head,
  }
  fixed = found["parameters"] + found["moments"] + found["kept for the backward pass"]
  # Gradients of blocks do not exist yet while the loss is made.
  at_loss = fixed + found["the loss at work"] + head
  at_block = fixed + found["gradients"] + found["a block at work"]
  found["peak"] = max(at_loss, at_block)
  print(
    f"memory budget, GB: keep {keep}, "
    + ("loop over layers, update at the end" if loop else "update in the backward pass")
  )
  for name, count in found.items():
    print(f"  {name:<28}{count / 1e9:8.2f}")
  return {name: count / 1e9 for name, count in found.items()}


def kept_by_a_block(size: Size, keep: str) -> float:
  """Bytes that one block keeps: of two blocks what one block does not ask for.

  Of "all" the scores of attention would count, which cuDNN does not keep.
  """
  if keep == "all":
    return math.nan
  one, two = (_asked_for(size, keep, layers) for layers in (1, 2))
  statistics = 4 * size.rows * size.heads * size.seq if keep != "nothing" else 0
  return two - one + statistics  # of cuDNN's softmax, beside what XLA's keeps


def _asked_for(size: Size, keep: str, layers: int) -> float:
  """Bytes that the backward pass reads, without parameters."""
  few = dataclasses.replace(size, layers=layers)
  blueprint, like = training.shapes(training.config(few, keep))
  tokens_BS = jax.ShapeDtypeStruct((size.rows, size.seq), jnp.int32)

  def backward(params, tokens_BS):
    def loss(params):
      x_BSD, infos = blueprint.model(params, {}).hidden(tokens_BS, train=True)
      return x_BSD, infos

    return jax.vjp(loss, params, has_aux=True)[1]

  with devices.as_if("hopper"):
    asked = jax.eval_shape(backward, like, tokens_BS)
  return _bytes(asked) - _bytes(like)


def _bytes(tree: Any) -> int:
  leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)
