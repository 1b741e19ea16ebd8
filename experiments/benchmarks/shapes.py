"""Layers of published models and skewed routing for them: what kernels are timed on."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
  """One sparse layer of SwiGLU experts and its tokens."""

  d_model: int
  d_ff: int
  num_experts: int
  k: int
  tokens: int

  def flops(self, *, backward: bool) -> float:
    """Of the three matrices of each choice; with both gradients three times as many."""
    once = 6.0 * self.tokens * self.k * self.d_model * self.d_ff
    return 3 * once if backward else once


SHAPES = {
  "mixtral": Shape(4096, 14336, 8, 2, 16384),
  "qwen3": Shape(2048, 768, 128, 8, 32768),
  "olmoe": Shape(2048, 1024, 64, 8, 32768),
  "dsv3": Shape(7168, 2048, 32, 8, 8192),  # the experts of one of eight devices
  "tiny": Shape(256, 128, 8, 2, 512),  # to try a script where there is no GPU
}


def routing(shape: Shape, *, skew: float = 0.3, seed: int = 0) -> Any:
  """(i32[T,K] distinct experts, f32[T,K] weights that sum to one).

  An expert's popularity is log-normal: Gumbel top-k over logits of deviation `skew`.
  """
  rng = np.random.default_rng(seed)
  liked_E = rng.normal(size=shape.num_experts) * skew
  drawn_TE = rng.gumbel(size=(shape.tokens, shape.num_experts)) + liked_E
  expert_TK = np.argpartition(-drawn_TE, shape.k - 1, axis=1)[:, : shape.k]
  weight_TK = rng.random((shape.tokens, shape.k)) + 0.5
  weight_TK /= weight_TK.sum(axis=1, keepdims=True)
  return expert_TK.astype(np.int32), weight_TK.astype(np.float32)


def balanced(shape: Shape, *, seed: int = 0) -> Any:
  """As `routing`, but every expert has equally many tokens, of every E/k in a row.

  Args:
    shape: k divides the experts, and E/k the tokens.
    seed: of which experts go together.
  """
  E, k = shape.num_experts, shape.k
  rng = np.random.default_rng(seed)
  rounds = np.tile(np.arange(E), (shape.tokens * k // E, 1))
  expert_TK = rng.permuted(rounds, axis=1).reshape(-1, k)
  weight_TK = rng.random((shape.tokens, k)) + 0.5
  weight_TK /= weight_TK.sum(axis=1, keepdims=True)
  return expert_TK.astype(np.int32), weight_TK.astype(np.float32)


def seconds(
  call: Callable[[], Any], *, repeats: int = 5, inner: int = 5
) -> list[float]:
  """Of one call, in each of several repeats; a repeat queues `inner` calls."""
  import jax

  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    for _ in range(inner):
      last = call()
    jax.block_until_ready(last)
    times.append((time.perf_counter() - begin) / inner)
  return times


def ceiling(size: int | None = None, *, repeats: int = 5) -> float:
  """FLOP/s of bfloat16 products of random square matrices: the median of some runs."""
  import jax

  if size is None:
    size = 1024 if jax.default_backend() == "cpu" else 8192
  product, operands = _squares(size)
  return (
    2
    * size**3
    / statistics.median(seconds(lambda: product(*operands), repeats=repeats, inner=10))
  )


@functools.cache
def _squares(size: int) -> Any:
  """A compiled product, and two matrices."""
  import jax
  import jax.numpy as jnp

  keys = (jax.random.key(0), jax.random.key(1))
  operands = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
  return jax.jit(jnp.matmul), operands
