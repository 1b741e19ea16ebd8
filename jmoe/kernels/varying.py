"""Arrays inside `jax.shard_map`: some differ between devices and some do not.

A function with a derivative of its own, and the start of a loop, must be told: jax
casts by itself only where it differentiates.  A cast of a replicated matrix is what
sums its gradient over the devices.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import search_method


def together(*trees: Any) -> tuple[Any, ...]:
  """The same, each array differing over every mesh axis over which any of them does."""
  axes = axes_of(trees)
  return jax.tree.map(lambda x: _cast(x, axes), trees) if axes else trees


def over(x: Array, axes: tuple[str, ...]) -> Array:
  """The same array, differing over some mesh axes too; its gradient is their sum."""
  return _cast(x, frozenset(axes))


def search(sorted_N: Array, queries: Array, side: str = "left") -> Array:
  """`jnp.searchsorted` as the device does it best.

  Searching wants queries that vary over a mesh as the sorted array does, before jax
  0.10.
  """
  sorted_N, queries = together(sorted_N, queries)
  return jnp.searchsorted(sorted_N, queries, side=side, method=search_method())


def differs(*trees: Any) -> bool:
  """Whether any array differs between the devices of a mesh."""
  return bool(axes_of(trees))


def zeros(shape: tuple[int, ...], dtype: Any, *like: Any) -> Array:
  """Zeros that differ over the mesh axes over which some arrays do."""
  return _cast(jnp.zeros(shape, dtype), axes_of(like))


def like(tree: Any, *others: Any) -> Any:
  """A kernel's results, differing where its operands do: some kernels do not say so."""
  axes = axes_of(others)
  return jax.tree.map(lambda x: _cast(x, axes), tree) if axes else tree


def struct(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
  """What a kernel gives, differing over the mesh axes over which its operands do.

  Inside `shard_map` jax wants to be told even where nothing differs.
  """
  leaves = sorted(jax.tree.leaves(operands), key=lambda leaf: not _own(leaf))
  for leaf in leaves[:1]:
    manual = getattr(jax.typeof(leaf), "manual_axis_type", None)
    if manual is not None:
      return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)
    made: Any = jax.ShapeDtypeStruct  # its argument's name before jax 0.10
    return made(shape, dtype, vma=_own(leaf))
  return jax.ShapeDtypeStruct(shape, dtype)


def axes_of(trees: Any) -> frozenset[str]:
  """Mesh axes over which any array differs; none outside of `shard_map`."""
  found: frozenset[str] = frozenset()
  for leaf in jax.tree.leaves(trees):
    found |= _own(leaf)
  return found


def _own(x: Array) -> frozenset[str]:
  """Mesh axes over which an array differs; none outside of `shard_map`."""
  kind = jax.typeof(x)
  manual = getattr(kind, "manual_axis_type", None)
  if manual is not None:
    return manual.varying
  return getattr(kind, "vma", frozenset())  # its name before jax 0.10


def _cast(x: Array, axes: frozenset[str]) -> Array:
  missing = tuple(sorted(axes - _own(x)))
  if not missing:
    return x
  pcast: Any = getattr(jax.lax, "pcast", None)
  if pcast is not None:
    return pcast(x, missing, to="varying")
  pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009  (before jax 0.8)
  return pvary(x, missing)
