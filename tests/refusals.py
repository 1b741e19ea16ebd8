"""What the tests of bad input share: layers to spoil, and what a refusal must be.

A row of their tables is (what is called, the exception, words that its message must
hold): the argument, its value, the remedy.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import time

import numpy as np
import pytest
from flax import nnx

from jmoe import dispatch, gates, layer, routers, simple, use
from jmoe.assign import capacity, renormalise
from jmoe.config import MoEConfig
from tests.compilations import COMPILED

T, D, E = 6, 8, 4
X = np.ones((T, D), np.float32)
X_BSD = np.ones((2, 3, D), np.float32)
IDS = np.zeros(T, np.int32)


def check(make, error: type[Exception], words: tuple[str, ...]) -> None:
  """The call raises, in one helpful line, at once and without compiling."""
  COMPILED.clear()
  start = time.process_time()
  with pytest.raises(error) as caught:
    make()
  seconds, message = time.process_time() - start, str(caught.value)
  assert not COMPILED, f"compiled before refusing: {message}"
  assert seconds < 1.0
  assert "\n" not in message and len(message) < 600, message
  for word in words:
    assert word in message, message


def numbered(**tables) -> dict[str, tuple]:
  """Rows of several tables by a name each."""
  return {f"{n}-{i}": row for n, rows in tables.items() for i, row in enumerate(rows)}


@functools.cache
def rngs() -> nnx.Rngs:
  return nnx.Rngs(0)


def small(**keywords) -> MoEConfig:
  """`simple` of a small layer."""
  return simple(D, 16, **{"num_experts": E, "k": 2, **keywords})


def dropless(**fields) -> MoEConfig:
  return dataclasses.replace(small(), **fields)


def limited(**fields) -> MoEConfig:
  return dataclasses.replace(small(capacity_factor=1.0), **fields)


def choosing(**fields) -> MoEConfig:
  """Expert choice."""
  own = dict(
    router=use(routers.expert_choice),
    renormalise=use(renormalise.never),
    dispatch=use(dispatch.buckets),
    losses=(),
  )
  return MoEConfig(D, E, **{**own, **fields})


def softly(**fields) -> MoEConfig:
  own = dict(
    gate=use(gates.slots),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    losses=(),
  )
  return MoEConfig(D, E, **{**own, **fields})


def hashed(**fields) -> MoEConfig:
  router = use(routers.hashed, vocab_size=5)
  return dropless(router=router, renormalise=use(renormalise.never), **fields)


def factor(**keywords):
  return use(capacity.by_factor, **{"factor": 1.0, **keywords})


def call(config=None, x=X, params=None, **arguments):
  """A call of the layer, with parameters that are shapes alone: it cannot run."""
  config = dropless() if config is None else config
  params = layer.param_shapes(config) if params is None else params
  return layer.moe(params, x, config, **arguments)
