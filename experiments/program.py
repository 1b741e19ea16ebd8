"""A run as functions of arrays, from its configuration; callers jit them."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from experiments import optim, state as states, step
from experiments.config import Run
from jmoe.config import ModelConfig

if TYPE_CHECKING:
  from experiments.spread import Spread


class Program(NamedTuple):
  """What trains and evaluates a run."""

  model: ModelConfig  # as it runs: over a mesh with its table and dispatch
  blueprint: states.Blueprint
  optimizer: optim.Optimizer
  key: np.ndarray  # u32[2] data of the key that parameters are drawn with
  start: Callable[[Any], states.TrainState]  # (key)
  train_step: Callable[[Any, Any], Any]  # (state, batch); donate the state
  eval_step: Callable[[Any, Any, Any], Any]  # (params, balance, batch)

  def init(self) -> states.TrainState:
    """The state before the first step."""
    return self.start(self.key)

  def of_seed(self, seed: int) -> "Program":
    """The same of another seed, with nothing to be compiled anew."""
    return self._replace(key=_key(seed))


def _key(seed: int) -> np.ndarray:
  # On the host, from where every device of every process takes it.
  return np.asarray(jax.random.key_data(jax.random.key(seed)))


def program(
  run: Run,
  *,
  byte_lengths: np.ndarray,
  num_domains: int,
  spread: "Spread | None" = None,
) -> Program:
  """The functions of a run.

  Args:
    run: what to train.
    byte_lengths: i32[V] of the vocabulary.
    num_domains: of the data set.
    spread: over which mesh; its own methods jit these functions.

  Raises:
    ValueError: roles, experts or steps of the optimizer do not fit the model.
  """
  model = run.model if spread is None else spread.model(run.model)
  blueprint, shapes = states.blueprint(model, run.param_dtype)
  optimizer = optim.optimizer(run.optim, steps=run.steps, params=shapes)
  lengths = np.zeros(run.model.vocab_size, np.int32)  # a model may have room to spare
  lengths[: len(byte_lengths)] = byte_lengths
  return Program(
    model,
    blueprint,
    optimizer,
    key=_key(run.seed),
    start=functools.partial(
      states.init_state,
      config=model,
      optimizer=optimizer,
      param_dtype=run.param_dtype,
    ),
    train_step=functools.partial(
      step.train_step,
      blueprint=blueprint,
      optimizer=optimizer,
      loss_weights=run.loss_weights,
      logits_z_loss=run.logits_z_loss,
      loss_chunk=run.loss_chunk,
      byte_lengths=lengths,
    ),
    eval_step=functools.partial(
      step.eval_step,
      byte_lengths=lengths,
      blueprint=blueprint,
      num_domains=num_domains,
      loss_chunk=run.loss_chunk,
    ),
  )
