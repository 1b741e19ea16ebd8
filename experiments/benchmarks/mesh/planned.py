"""The benchmark's layers as the planner takes them, with the loads that they have."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import numpy as np

from experiments.benchmarks import shapes
from experiments.benchmarks.mesh.layer import OWN_FIRST
from experiments.benchmarks.shapes import Shape
from experiments.planning import exchanges, rates
from experiments.planning.chips import CHIPS
from jmoe.presets import mixtral


def layer_of(
  shape: Shape, n: int, *, balanced: bool, factor: float = 1.0
) -> exchanges.Layer:
  """A layer over devices, forward and backward.

  Args:
    shape: with the tokens of one device.
    n: devices.
    balanced: the routing; else skewed.
    factor: of capacity, where there is one.
  """
  config = mixtral.layer(
    d_model=shape.d_model, d_ff=shape.d_ff, num_experts=shape.num_experts, k=shape.k
  )
  load_E = _loads(dataclasses.replace(shape, tokens=n * shape.tokens), balanced)
  return exchanges.Layer(
    config, repeat=1, tokens=shape.tokens, itemsize=2, stored=2, again=False,
    devices=n, inside=n // 2 if n >= 4 else n, tensor=1, factor=factor, skew=0.0,
    every_slot=False,
    popularity=load_E / load_E.sum() * shape.k,
    tile=1 if balanced else rates.TILE,  # balanced loads fill theirs
    waited=rates.waited(CHIPS["H200"]),
    copies=True,
  )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _loads(shape: Shape, balanced: bool) -> np.ndarray:
  expert_TK, _ = (shapes.balanced if balanced else shapes.routing)(shape)
  return np.bincount(np.asarray(expert_TK).reshape(-1), minlength=shape.num_experts)


def strategy_of(name: str) -> str:
  """The planner's name of a row's strategy."""
  found = name.partition(",")[0].replace(OWN_FIRST, "+own_first")
  return "gather experts" if found == "gather" else found
