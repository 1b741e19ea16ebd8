"""All that training carries from step to step, as one tree of arrays.

A model is taken apart into arrays by dotted name and a `Blueprint` that puts it
together again inside a traced function (`jmoe.models.by_name`).
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.optim import Optimizer, role
from jmoe.config import ModelConfig
from jmoe.models import Decoder
from jmoe.models.by_name import (
  Blueprint as Blueprint,
  path_part as path_part,
  take_apart as take_apart,
)
from jmoe.types import pytree

Arrays = dict[str, Array]
_NARROW = ("shared", "expert", "embedding", "matrix")  # not what routes or scales


@pytree
class TrainState:
  """A run between two steps."""

  step: Array  # i32[]  steps done
  skipped: Array  # i32[]  those of them that changed nothing, as loss was no number
  key: Array  # u32[2]  data of the run's random key; steps fold their number
  params: Arrays
  balance: Arrays  # what is not learned by gradient, e.g. routing biases
  optimizer: Any


def blueprint(
  config: ModelConfig, param_dtype: str = "float32"
) -> tuple[Blueprint, dict[str, jax.ShapeDtypeStruct]]:
  """The structure of a model, and its parameters' shapes by name; nothing is computed.

  Args:
    config: the model.
    param_dtype: what parameters are stored in; see `stored`.
  """
  made, params, _ = take_apart(nnx.eval_shape(functools.partial(_model, config)))
  return made, jax.eval_shape(functools.partial(stored, dtype=param_dtype), params)


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "param_dtype"))
def init_state(
  key: Array, *, config: ModelConfig, optimizer: Optimizer, param_dtype: str = "float32"
) -> TrainState:
  """The state before the first step, from the data (u32[2]) of a random key.

  Args:
    key: a stack of them, under `jax.vmap`, gives a stack of states.
    config: the model.
    optimizer: made for the shapes that `blueprint` gives with the same `param_dtype`.
    param_dtype: "float32" or "bfloat16".
  """
  _, params, balance = take_apart(_model(config, jax.random.wrap_key_data(key)))
  zero = jnp.zeros((), jnp.int32)
  made = stored(params, param_dtype)
  # From what was drawn, so that float32 copies begin with all of their bits.
  return TrainState(zero, zero, key, made, balance, optimizer.init(params))


def stored(params: Arrays, dtype: str) -> Arrays:
  """Parameters in the dtype that they are stored in.

  "float32" leaves them as the model makes them.  A narrower one is for matrices and
  embeddings alone: gates route and norms scale, and both are small.
  """
  if dtype == "float32":
    return params
  return {n: x.astype(dtype) if role(n) in _NARROW else x for n, x in params.items()}


def started_from(
  like: Mapping[str, Any], saved: Mapping[str, Any], what: str = "parameters"
) -> Arrays:
  """Another run's arrays, by name and shape, in the dtypes of this one.

  Args:
    like: of this run: anything with a shape and a dtype, by name.
    saved: of the other.
    what: they are, for the message.

  Raises:
    ValueError: on one line, the names that only one of the two has, and those of
      another shape.
  """
  wrong = [
    (kind, sorted(names))
    for kind, names in (
      ("missing", set(like) - set(saved)),
      ("not in this model", set(saved) - set(like)),
    )
    if names
  ]
  shapes = [
    f"{n} {tuple(saved[n].shape)}, not {tuple(like[n].shape)}"
    for n in sorted(set(like) & set(saved))
    if tuple(saved[n].shape) != tuple(like[n].shape)
  ]
  wrong += [("of another shape", shapes)] if shapes else []
  if wrong:
    found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong)
    raise ValueError(
      f"start_from: the other run's {what} are not those of this model ({found}); "
      "start from a run of the same model."
    )
  return {n: jnp.asarray(saved[n]).astype(like[n].dtype) for n in like}


def restarted(
  state: TrainState,
  params: Mapping[str, Any],
  balance: Mapping[str, Any],
  *,
  optimizer: Optimizer,
) -> TrainState:
  """A new run's state with the model of another: step 0, and no moments yet.

  Args:
    state: from `init_state`.
    params: of the other run.
    balance: of the other run; routing biases and tables belong to what it learned.
    optimizer: of this run.

  Raises:
    ValueError: as `started_from`.
  """
  return TrainState(
    state.step,
    state.skipped,
    state.key,
    started_from(state.params, params),
    started_from(state.balance, balance, "balance state"),
    # As they were saved: float32 copies begin with all of the bits there are.
    optimizer.init({name: jnp.asarray(params[name]) for name in state.params}),
  )


def _model(config: ModelConfig, key: Array | None = None) -> Decoder:
  return Decoder(config, rngs=nnx.Rngs(jax.random.key(0) if key is None else key))
