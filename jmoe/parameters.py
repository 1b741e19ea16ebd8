"""What a layer starts with: its parameters, part by part, and its state."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import checks
from jmoe.config import MoEConfig
from jmoe.losses.total import batches_of_update
from jmoe.types import Params, State
from jmoe.use import fact


def sections(config: MoEConfig) -> dict[str, Any]:
  """`init(key) -> dict` of every part that may have parameters, jitted."""
  sizes: dict[str, Any] = dict(
    d_model=config.d_model,
    num_experts=config.num_experts,
    dtype=jnp.dtype(config.param_dtype),
  )
  parts = {"gate": config.gate, "experts": config.experts}
  if config.aggregate is not None:
    parts["aggregate"] = config.aggregate
  inits = {name: functools.partial(u.init, **sizes) for name, u in parts.items()}
  if config.shared is not None:
    one = {**sizes, "num_experts": 1}
    inits["shared"] = functools.partial(config.shared.init, **one)
    inits["join"] = functools.partial(config.join.init, **sizes)
  return inits


@functools.partial(jax.jit, static_argnames=("config", "name"))
def init_section(key: Array, config: MoEConfig, name: str) -> dict[str, Any]:
  """The parameters of one part: "gate", "experts", "shared", "join", "aggregate"."""
  return sections(config)[name](key)


def moe_init(key: Array, config: MoEConfig) -> dict[str, Any]:
  """Parameters of a layer: a dict per part that has any.

  Args:
    key: of the draw.
    config: the layer.

  Returns:
    `{"gate": {...}, "experts": {...}, ...}` with the same names under either shell.

  Raises:
    TypeError, ValueError: no configuration, or no random key.
  """
  checks.layer_of("moe_init: config", config)
  checks.random_key("moe_init: key", key)
  return _init(key, config)


@functools.partial(jax.jit, static_argnames=("config",))
def _init(key: Array, config: MoEConfig) -> dict[str, Any]:
  made = {
    name: init(jax.random.fold_in(key, i))
    for i, (name, init) in enumerate(sections(config).items())
  }
  return {name: part for name, part in made.items() if part}


@functools.lru_cache(maxsize=64)
def param_shapes(config: MoEConfig) -> dict[str, Any]:
  """Shapes and dtypes of the parameters, part by part; nothing is computed."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda key: _init(key, config), key)


def has_state(config: MoEConfig) -> bool:
  """Whether a layer carries anything beside its parameters."""
  marks = (config.gate.function, "buffers"), (config.router.function, "table")
  if config.balance is not None or batches_of_update(config.losses) > 1:
    return True
  return any(hasattr(f, name) for f, name in marks)


def after_step(config: MoEConfig, params: Params, state: State) -> State:
  """The state with what a gate reads of the experts made anew, if the gate says so.

  Args:
    config: the layer.
    params: its parameters after the optimizer step.
    state: that a call in training returned.
  """
  renewed = fact(config.gate, "after_step")
  if renewed is None or not state.gate:
    return state
  gate = renewed(params["experts"], state.gate, **config.gate.kwargs)
  return dataclasses.replace(state, gate=gate)


def init_state(config: MoEConfig, params: Params, key: Array | None = None) -> State:
  """What a layer carries beside parameters; empty for most.

  Args:
    config: the layer.
    params: its parameters (a parameter-free gate reads the experts).
    key: for hashed routing's table.

  Raises:
    TypeError, ValueError: no configuration, no parameters where they are read, or no
      random key where a table is drawn.
  """
  checks.layer_of("init_state: config", config)
  bias = jnp.zeros(config.num_experts) if config.balance is not None else None
  buffers = getattr(config.gate.function, "buffers", None)
  make_table = getattr(config.router.function, "table", None)
  table = None
  if make_table is not None:
    if key is None:
      raise ValueError(f"init_state: {config.router.name} draws a table; pass key=...")
    checks.random_key("init_state: key", key)
    table = make_table(key, config.num_experts, **config.router.kwargs)
  if buffers is not None:
    checks.params(params, config)
  gate = {} if buffers is None else buffers(params["experts"])
  state = State(bias=bias, gate=gate, table=table)
  if batches_of_update(config.losses) == 1:
    return state
  counted = jnp.zeros(config.num_experts, jnp.int32)
  return dataclasses.replace(state, counted=counted, batches=jnp.zeros((), jnp.int32))
