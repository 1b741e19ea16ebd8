"""Whether nested dicts of arrays are those of a layer: names, shapes, dtypes."""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.use import fact, shown


def params(given: Any, config: Any) -> None:
  """Raises unless these are the parameters of a layer."""
  _tree("params", given, _param_shapes(config))


def buffers(given: Any, config: Any) -> None:
  """Raises unless this is what the gate of a layer keeps in `State.gate`."""
  _tree("state.gate", given, _buffer_shapes(config))


@functools.lru_cache(maxsize=64)
def _param_shapes(config: Any) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter of a layer."""
  from jmoe.layer import param_shapes

  return _shapes(param_shapes(config))


@functools.lru_cache(maxsize=64)
def _buffer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
  """The same for what a gate keeps in `State.gate`."""
  from jmoe.layer import param_shapes

  buffers = fact(config.gate, "buffers")
  if buffers is None:
    return {}
  return _shapes(jax.eval_shape(buffers, param_shapes(config)["experts"]))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def _tree(name: str, given: Any, expected: dict[str, tuple[int, ...]]) -> None:
  remedy = "make it with moe_init(key, config)"
  if name != "params":
    remedy = "make it with init_state(config, params)"
  try:
    leaves = jax.tree_util.tree_leaves_with_path(dict(given))
  except (TypeError, ValueError):
    raise TypeError(f"{name}={shown(given)} is not a dict; {remedy}.") from None
  found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  for path, shape in expected.items():
    leaf = found.pop(path, None)
    if leaf is None:
      raise ValueError(f"{name}{path} {shape} is missing; {remedy}.")
    if getattr(leaf, "shape", ()) != shape:
      raise ValueError(
        f"{name}{path} has shape {getattr(leaf, 'shape', ())}; the configuration needs "
        f"{shape}: {remedy}, or change the configuration."
      )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name}{path} has dtype {dtype}; expected a float dtype.")
  for path in found:
    raise ValueError(f"{name}{path} is not part of the configured layer; remove it.")
