"""The compiled steps of a series' arms: one by one, or side by side beforehand."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from experiments import batches, seeds
from experiments.config import Run
from experiments.program import Program


class Steps(NamedTuple):
  """What trains and evaluates the seeds of an arm."""

  train: Any  # (states, batches) of all seeds; None if no step is left
  evaluate: Any  # (params, balance, batch) of one
  memory: Mapping[str, int]  # bytes of the training step, by kind


class Wanted(NamedTuple):
  """An arm whose steps will be needed."""

  run: Run
  made: Program
  many: int  # seeds in the program
  trains: bool = True  # else all steps are done, and it is evaluated alone

  @property
  def name(self) -> tuple[Run, int]:
    """Equal where the steps are: they do not depend on seeds."""
    data = dataclasses.replace(self.run.data, seed=0)
    return dataclasses.replace(self.run, seed=0, data=data, start_from=""), self.many


def compiled(wanted: Wanted) -> Steps:
  """The steps of an arm."""
  of, made = wanted.run.data, wanted.made
  state = jax.eval_shape(made.init)
  train, memory = None, {}
  if wanted.trains:
    stacked = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((wanted.many, *x.shape), x.dtype), state
    )
    several = batches.shapes(of.batch, of.seq, models=wanted.many)
    train = seeds.jitted(made.train_step).lower(stacked, several).compile()
    found = train.memory_analysis()
    memory = {
      "arguments": found.argument_size_in_bytes,
      "temporary": found.temp_size_in_bytes,
    }
  one = batches.shapes(of.batch, of.seq)
  evaluate = jax.jit(made.eval_step).lower(state.params, state.balance, one).compile()
  return Steps(train, evaluate, memory)


class Ahead:
  """Steps that were compiled before they are asked for; others are when they are.

  Args:
    arms: whose steps to compile now.
    workers: how many at a time.
  """

  def __init__(self, arms: Sequence[Wanted] = (), workers: int = 1):
    each = {wanted.name: wanted for wanted in arms}
    self._found: dict[Any, Steps] = {}
    if each:
      # XLA compiles without holding Python's lock, so that threads are enough.
      with ThreadPoolExecutor(workers) as pool:
        self._found = dict(zip(each, pool.map(compiled, each.values()), strict=True))

  def steps(self, wanted: Wanted) -> Steps:
    """The steps of an arm."""
    found = self._found.get(wanted.name)
    return compiled(wanted) if found is None else found
