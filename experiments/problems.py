"""Problems whose answer is one table's entry, or a table's entry of another's.

Four tokens: `f g x =`, to be answered with f(g(x)); or `- g x =`, with g(x).  Tables
are permutations, drawn from a key, so that all answers are equally frequent.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import pytree

KINDS = ("one step", "two steps", "held out")  # two steps that training leaves out
_LONG = 4  # tokens of a problem


@dataclasses.dataclass(frozen=True)
class Task:
  """How many problems there are, and how they are laid out."""

  functions: int  # F
  values: int  # X
  rows: int = 64  # of a batch
  seq: int = 64  # tokens of a row, each problem a document of its own
  one_step: float = 0.25  # of the problems of training
  held_out: float = 0.1  # of the F*F*X problems of two steps

  def __post_init__(self):
    if self.functions < 1 or self.values < 2:
      raise ValueError(
        f"functions={self.functions}, values={self.values}; give one function or more "
        "of two values or more."
      )
    if not 1 <= self.left_out < self.functions**2 * self.values:
      raise ValueError(
        f"held_out={self.held_out} of {self.functions**2 * self.values} problems "
        "leaves none of them, or none to train on; change it, or their number."
      )
    if self.seq % _LONG:
      raise ValueError(f"seq={self.seq} does not hold whole problems of {_LONG}.")

  @property
  def left_out(self) -> int:
    """Problems of two steps that are not trained on."""
    return round(self.held_out * self.functions**2 * self.values)

  @property
  def tokens(self) -> int:
    """Of the vocabulary: values, functions, "-" and "="."""
    return self.values + self.functions + 2


@pytree
class Tables:
  """The functions, and which problems are trained on."""

  answer_FX: Array  # i32[F,X]
  triple_N: Array  # i32[F*F*X] numbers of all (f, g, x); the last are held out


class _Problems(NamedTuple):
  """i32[P] each; f is F where there is none, live 0 where there is no problem."""

  f: Array
  g: Array
  x: Array
  kind: Array  # of `KINDS`
  live: Array


def tables(key: Array, task: Task) -> Tables:
  """Drawn from a key."""
  functions, order = jax.random.split(key)
  F, X = task.functions, task.values
  each = jax.random.split(functions, F)
  answer_FX = jax.vmap(lambda key: jax.random.permutation(key, X))(each)
  return Tables(
    answer_FX.astype(jnp.int32),
    jax.random.permutation(order, F * F * X).astype(jnp.int32),
  )


def drawn(key: Array, given: Tables, task: Task) -> dict[str, Array]:
  """A batch of training, i32[rows,seq] each, as of `experiments.data.batches`."""
  which, steps = jax.random.split(key)
  count = task.rows * task.seq // _LONG
  trained = given.triple_N.shape[0] - task.left_out
  number = given.triple_N[jax.random.randint(which, (count,), 0, trained)]
  one = jax.random.bernoulli(steps, task.one_step, (count,))
  f, g, x = _parts(number, task)
  f = jnp.where(one, task.functions, f)
  kind = jnp.where(one, 0, 1)
  return _batch(_Problems(f, g, x, kind, jnp.ones_like(f)), given, task)


def asked(given: Tables, task: Task) -> dict[str, Array]:
  """All problems of one step, those held out, and as many of two steps that are not.

  One batch; `domain` is the number in `KINDS`.
  """
  F, X, m = task.functions, task.values, task.left_out
  N = given.triple_N.shape[0]
  pair = jnp.arange(F * X, dtype=jnp.int32)
  number = jnp.concatenate(
    [pair, given.triple_N[: min(m, N - m)], given.triple_N[N - m :]]
  )
  kind = jnp.repeat(
    jnp.arange(3, dtype=jnp.int32),
    jnp.array([F * X, min(m, N - m), m]),
    total_repeat_length=number.shape[0],
  )
  f, g, x = _parts(number, task)
  f = jnp.where(kind == 0, F, f)
  fill = -len(number) % (task.seq // _LONG)
  found = _Problems(f, g, x, kind, jnp.ones_like(f))
  return _batch(_Problems(*(jnp.pad(a, (0, fill)) for a in found)), given, task)


def _parts(number: Array, task: Task) -> tuple[Array, Array, Array]:
  F, X = task.functions, task.values
  return number // (F * X) % F, number // X % F, number % X


def _batch(some: _Problems, given: Tables, task: Task) -> dict[str, Array]:
  F, X = task.functions, task.values
  inner = given.answer_FX[some.g, some.x]
  outer = given.answer_FX[jnp.minimum(some.f, F - 1), inner]
  answer = jnp.where(some.f == F, inner, outer)
  zero = jnp.zeros_like(answer)
  each = task.seq // _LONG  # problems of a row
  number = jnp.arange(len(answer), dtype=jnp.int32) % each + 1
  place = jnp.arange(_LONG, dtype=jnp.int32)

  def rows(*tokens: Array) -> Array:
    return jnp.stack(tokens, axis=-1).reshape(-1, task.seq)

  return {
    "inputs": rows(X + some.f, X + some.g, some.x, zero + X + F + 1),
    "targets": rows(zero, zero, zero, answer),
    "scored": rows(zero, zero, zero, some.live),
    "domain": rows(*4 * [some.kind]),
    "segment": rows(*4 * [number * some.live]),
    "position": rows(*(zero + n for n in place)),
  }


def right(logits_BSV: Array, batch: dict[str, Any]) -> Array:
  """f32[3] share of right answers among the problems of each kind."""
  scored = batch["scored"] > 0
  good = scored & (jnp.argmax(logits_BSV, -1) == batch["targets"])
  of_kind = scored & (batch["domain"] == jnp.arange(3)[:, None, None])
  total = jnp.sum(of_kind, (1, 2)).astype(jnp.float32)
  return jnp.sum(good & of_kind, (1, 2)).astype(jnp.float32) / jnp.maximum(total, 1)
