"""Recorded choices of a call, split over a mesh like its tokens."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jmoe.parallel import rules as tables
from jmoe.parallel.rules import Axes


def of_call(
  forced: Array | None, config: Any, lead: tuple[int, ...], at: P, split: Any
) -> tuple[Array | None, P]:
  """The choices in the shape of what a mesh splits, and their spec.

  Args:
    forced: i32[T,K] or i32[L,T,K]; i32[G,E,C] of expert choice.
    config: the layer.
    lead: leading dimensions of the activations.
    at: spec of the activations.
    split: the table and the mesh.
  """
  if forced is None:
    return None, P()
  dims = list(at)
  if config.k is None:  # [G,E,C] tokens of the call, group by group
    if len(lead) == 1 or not split.axes("sequence"):
      return forced, tables.spec(split.token_axes)
    # A group lies in one piece of a row: a piece has every so many groups.
    groups = forced.shape[0] // math.prod(lead[:-1])
    return forced.reshape(*lead[:-1], groups, *forced.shape[1:]), P(*dims)
  layers = forced.shape[:-2]
  dims = dims + [None] * (len(lead) - len(dims))
  return forced.reshape(*layers, *lead, config.k), P(*[None] * len(layers), *dims)


def of_shard(
  forced: Array | None,
  config: Any,
  lead: tuple[int, ...],
  local: tuple[int, ...],
  split: Any,
) -> Array | None:
  """The same on one shard, as a layer of one device takes it.

  Args:
    local: `lead` on the shard.
    Others: as for `of_call`, with its choices.
  """
  if forced is None:
    return None
  if config.k is not None:
    layers = forced.shape[: forced.ndim - 1 - len(lead)]
    return forced.reshape(*layers, -1, config.k)
  forced = forced.reshape(-1, *forced.shape[-2:])
  here = _here(forced, lead, local, split)
  return jnp.where(forced < 0, forced, here)


def _here(
  token: Array, lead: tuple[int, ...], local: tuple[int, ...], split: Any
) -> Array:
  """The places on this shard of its tokens, which are counted over the call."""

  def first(axes: Axes, size: int) -> Any:
    return lax.axis_index(axes) * size if axes else 0

  if len(lead) == 1:
    return token - first(split.token_axes, math.prod(local))
  row = token // lead[-1] - first(split.axes("tokens"), math.prod(local[:-1]))
  return row * local[-1] + token % lead[-1] - first(split.axes("sequence"), local[-1])
