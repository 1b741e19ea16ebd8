"""Whether a call of the layer can work: shapes, dtypes, and what stages need.

Reads shapes and dtypes alone, so that nothing is computed before the first error.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe import _id_checks
from jmoe._tree_checks import buffers, params as params
from jmoe.contexts import check as check_context
from jmoe.losses.total import batches_of_update
from jmoe.types import Context, Params, State, num_groups
from jmoe.use import Use, fact, shown


def activations(x: Any, config: Any, rank: int | None = None) -> None:
  """Raises unless x can be the input of a layer.

  Args:
    x: what was given.
    config: a `MoEConfig`.
    rank: how many dimensions x must have; None: any number but zero.
  """
  layer_of("config", config)
  D = config.d_model
  expected = f"[T, {D}] (the shells take any leading dimensions)"
  if rank is None:
    expected = f"[..., {D}]"
  if not (hasattr(x, "shape") and hasattr(x, "dtype")):
    raise TypeError(f"x={shown(x)} is not an array; expected {expected}.")
  if len(x.shape) < 1 or x.shape[-1] != D or len(x.shape) != (rank or len(x.shape)):
    raise ValueError(f"x has shape {x.shape}; expected {expected}.")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x has dtype {x.dtype}; expected a float dtype, so cast it.")
  if math.prod(x.shape) == 0:
    raise ValueError(f"x has shape {x.shape}: there are no tokens; leave the call out.")


def layer_of(name: str, config: Any) -> None:
  """Raises unless an argument is the configuration of a layer."""
  if not hasattr(config, "router"):
    raise TypeError(
      f"{name}={shown(config)} is not a MoEConfig; make one with jmoe.simple(...)."
    )


def flag(name: str, value: Any) -> None:
  """Raises unless an argument is True or False, known while tracing."""
  if isinstance(value, Array):
    raise TypeError(
      f"{name}={shown(value)} is an array; pass True or False (nn.remat of this module "
      "traces it: transform the module that calls it)."
    )
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{name}={shown(value)} must be True or False.")


def random_key(name: str, key: Any) -> None:
  """Raises unless an argument is one random key, of the new kind or of the old."""
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not (typed and shape == () or dtype == jnp.uint32 and len(shape or ()) == 1):
    what = f"of shape {shape}" if typed else f"{shown(key)}"
    raise ValueError(f"{name} {what} is not one random key; pass jax.random.key(0).")


def call(
  given: Params,
  x: Array,
  config: Any,
  context: Context,
  state: State,
  key: Array | None,
  train: bool,
  residual: Array | None,
  previous_logits: Array | None,
  forced: Array | None,
  axes: Any,
  with_plan: bool = False,
) -> Context:
  """Checks a call of the layer, whose x has passed `activations`.

  Returns:
    The context with what is static about it filled in, and the state's table.
  """
  lead = x.shape[:-1]
  T, E = math.prod(lead), config.num_experts
  params(given, config)
  check_context(context, lead)
  if not isinstance(state, State):
    raise TypeError(
      f"state={shown(state)} is no jmoe.State; pass init_state(config, params)."
    )
  flag("train", train)
  flag("with_plan", with_plan)
  context = _completed(context, config, state, T)
  _needs(context, config, train)
  _state(state, config, train)
  _key(config, key, train)
  if residual is not None:
    _array("residual", residual, x.shape, jnp.floating)
    _read_by("residual", "aggregate", config.aggregate)
  elif owns_skip(config):
    raise ValueError(
      f"residual=None, but aggregate={config.aggregate!r} adds the block's skip "
      "connection itself; pass residual=..., shaped like x, and add nothing to the "
      "output, or use residual='outer' there."
    )
  if previous_logits is not None:
    _array("previous_logits", previous_logits, (T, E), jnp.floating)
    _read_by("previous_logits", "gate", config.gate)
  if forced is not None:
    _forced(forced, config, context, T)
  _axes(axes)
  _id_checks.call(config, context, forced, T)
  return context


def owns_skip(config: Any) -> bool:
  """Whether a layer's aggregation adds the block's skip connection itself."""
  if config.aggregate is None:
    return False
  return fact(config.aggregate, "skips", lambda **_: False)(**config.aggregate.kwargs)


def _read_by(name: str, stage: str, use: Use | None) -> None:
  if use is None or not _reads(use, name):
    raise ValueError(
      f"{name} is given, but {stage}={use!r} does not read it; leave it out, or use "
      "one that does."
    )


@functools.lru_cache(maxsize=64)
def _reads(use: Use, name: str) -> bool:
  """Whether a stage takes an optional argument and says not that it ignores it."""
  ignored = fact(use, "ignores", lambda **_: ())(**use.kwargs)
  parameters = inspect.signature(use.function).parameters
  return name not in ignored and (name in parameters or f"{name}_TD" in parameters)


def _axes(axes: Any) -> None:
  names = axes if isinstance(axes, tuple) else (axes,)
  if axes is None:
    return
  if not all(isinstance(name, str) for name in names):
    raise TypeError(f"axes={shown(axes)} must be a tuple of names of mesh axes.")
  try:
    jax.lax.psum(1, axes)  # of a constant: the size of the axes, nothing is computed
  except NameError as error:
    raise ValueError(
      f"axes={axes!r}: {error}; pass axes=None outside shard_map, or the names of its "
      "mesh axes."
    ) from None


def _array(name: str, array: Any, shape: tuple[Any, ...], kind: Any) -> None:
  if not (hasattr(array, "shape") and hasattr(array, "dtype")):
    raise TypeError(f"{name}={shown(array)} is not an array; pass one of {shape}.")
  if array.shape != shape:
    raise ValueError(f"{name} has shape {array.shape}; expected {shape}.")
  if not jnp.issubdtype(array.dtype, kind):
    raise ValueError(f"{name} has dtype {array.dtype}; expected {_named(kind)}.")


def _named(kind: Any) -> str:
  return "integers" if kind is jnp.integer else "a float dtype"


def _completed(context: Context, config: Any, state: State, T: int) -> Context:
  if context.group_size is not None:
    raise ValueError(
      f"context.group_size={context.group_size} is the layer's to say; use "
      "MoEConfig(group_size=...)."
    )
  if context.row_segments is not None:
    raise ValueError(
      f"context.row_segments={context.row_segments} is the layer's to say; give "
      "segments shaped like the activations, [..., S]."
    )
  changed: dict[str, Any] = {"group_size": config.group_size}
  by_row = config.group_size == "row" or fact(config.gate, "dense")
  num_rows = context.num_rows
  if num_rows is not None and context.row is None and T % num_rows:
    raise ValueError(
      f"context.num_rows={num_rows} does not divide {T} tokens; give row=i32[T]."
    )
  if by_row and (num_rows is None or context.row is not None):
    raise ValueError(
      f"context.num_rows={num_rows}: routing by row needs rows of equal length; "
      "give num_rows and no row (pad short rows, with valid)."
    )
  if config.group_size == "row":
    changed["group_size"] = T // num_rows  # type: ignore[operator]
  if context.table is None and state.table is not None:
    changed["table"] = state.table
  return dataclasses.replace(context, **changed)


def _needs(context: Context, config: Any, train: bool) -> None:
  for use in (config.gate, config.router, *config.restrict):
    names = fact(use, "needs", ())
    for name in (*names, *(fact(use, "needs_in_training", ()) if train else ())):
      if getattr(context, name) is None:
        raise ValueError(f"{use.name} needs context.{name}; pass Context({name}=...).")
  for loss in config.losses:
    if loss.kwargs.get("modality") is not None and context.modality is None:
      raise ValueError(
        f"{loss.name} needs context.modality; pass Context(modality=...)."
      )
    if loss.kwargs.get("over") == "sequence" and context.num_rows is None:
      raise ValueError(
        f"{loss.name} over='sequence' needs context.num_rows; pass "
        "Context(num_rows=...)."
      )
  if not fact(config.router, "table"):
    return
  table, V = context.table, config.router.kwargs.get("vocab_size")
  if table is None:
    raise ValueError(
      f"{config.router.name} needs a table: pass state=init_state(config, params, "
      "key), or Context(table=...)."
    )
  if table.ndim not in (1, 2) or table.shape[-1] != V:
    raise ValueError(
      f"context.table has shape {table.shape}; expected ({V},), or (L, {V}) with layer."
    )
  if table.ndim == 2 and context.layer is None:
    raise ValueError("context.table is i32[L,V]; pass Context(layer=...) with it.")


def _state(state: State, config: Any, train: bool) -> None:
  if fact(config.gate, "buffers") and not state.gate:
    raise ValueError(
      f"{config.gate.name} reads State.gate; pass state=init_state(config, params)."
    )
  buffers(state.gate, config)
  if config.balance is not None and state.bias is None:
    raise ValueError("balance needs State.bias; pass state=init_state(config, params).")
  if train and batches_of_update(config.losses) > 1:
    if state.counted is None or state.batches is None:
      raise ValueError(
        "load_balance accumulate needs State.counted; pass state=init_state(config, "
        "params)."
      )
    _array("state.counted", state.counted, (config.num_experts,), jnp.integer)
  if state.bias is not None:
    _array("state.bias", state.bias, (config.num_experts,), jnp.floating)


def _key(config: Any, key: Any, train: bool) -> None:
  if key is not None:
    random_key("key", key)
    return
  # Priority matters only where something can be dropped.
  limited = config.capacity is not None or config.max_rows is not None
  drawing = [config.input_noise, config.logit_noise, config.select_noise, config.router]
  drawing += [config.priority] if limited else []
  for use in (*drawing, *config.restrict):
    if use is None or fact(use, "random") is None:
      continue
    if fact(use, "random")(train, **use.kwargs):
      raise ValueError(f"{use!r} draws random numbers; pass key=jax.random.key(...).")


def _forced(forced: Any, config: Any, context: Context, T: int) -> None:
  if fact(config.router, "dense"):
    raise ValueError("forced: Soft MoE makes no choices to replay; leave it out.")
  shape = getattr(forced, "shape", ())
  if config.k is not None and len(shape) == 3:
    if context.layer is None:
      raise ValueError(
        f"forced has shape {shape}, [L, T, K]; pass Context(layer=...) with it."
      )
    _array("forced", forced, (shape[0], T, config.k), jnp.integer)
    return
  expected = (T, config.k)
  slots = fact(config.router, "slots")
  if config.k is None and slots is not None:
    S = context.group_size or T
    assert not isinstance(S, str)
    G, E = num_groups(T, context.group_size), config.num_experts
    expected = (G, E, slots(S, E, **config.router.kwargs))
  _array("forced", forced, expected, jnp.integer)
