"""Which part of each parameter a device holds, by its name and role.

`expert` divides the experts, `tensor` the hidden width of feed-forwards and the heads
of attention, `fsdp` the largest dim that is left and whose parts are whole tiles.  What
no axis divides is whole on every device, as norms are.
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from experiments.optim import roles

TOKENS = ("data", "fsdp", "expert", "context")  # axes over which tokens are divided
_LEAST = 2**14  # scalars of a layer that are worth dividing over fsdp


def spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
  """The mesh axes of a parameter's dims, without axes of size one.

  Args:
    name: dotted, of `state.blueprint`.
    shape: of the whole array, stacks included.
    sizes: of the mesh axes.
  """
  axes: list[str | None] = [None] * len(shape)
  layers = int(name.startswith("segments."))  # a dim that is scanned over
  if roles.role(name) == "expert" and _divides(sizes, "expert", shape[layers]):
    axes[layers] = "expert"
  first = roles.stacked(name)
  dim = _hidden_dim(name, len(shape), first)
  if dim is not None and _divides(sizes, "tensor", shape[dim]):
    axes[dim] = "tensor"
  free = [n for n in range(first, len(shape)) if axes[n] is None]
  free = [n for n in free if _divides(sizes, "fsdp", shape[n])]
  if free and math.prod(shape[layers:]) >= _LEAST:
    whole = [n for n in free if shape[n] // sizes["fsdp"] % _tile(n, shape) == 0]
    axes[max(whole or free, key=lambda n: shape[n])] = "fsdp"
  return PartitionSpec(*axes)


def share(spec: PartitionSpec, sizes: Mapping[str, int]) -> float:
  """Part of an array that a device holds."""
  return 1.0 / math.prod(sizes.get(axis, 1) for axis in spec if axis is not None)


def like(name: str, shape: tuple[int, ...], params: Mapping[str, Any]) -> str | None:
  """The parameter that an array of the optimizer's state goes with, if it is as large.

  Args:
    name: path of the array in the state.
    shape: of the array.
    params: of the model, by name.
  """
  for param in sorted(params, key=len, reverse=True):
    if param in name and params[param].shape == shape:
      return param
  return None


def _divides(sizes: Mapping[str, int], axis: str, size: int) -> bool:
  return sizes.get(axis, 1) > 1 and size % sizes[axis] == 0


def _tile(dim: int, shape: tuple[int, ...]) -> int:
  """Entries of a TPU's tile, of which memory is made.

  Mixtral's step, its d_ff in parts of 224, had a GiB more alive than with whole tiles.
  """
  return {1: 128, 2: 8}.get(len(shape) - dim, 1)


def _hidden_dim(name: str, ndim: int, first: int) -> int | None:
  """The dim of d_ff or heads, which `tensor` divides; None if there is none."""
  last = name.rsplit(".", 1)[-1]
  if ndim - first != 2:
    return None
  if last.endswith(("_EDF", "_DF")):
    return ndim - 1
  if last.endswith(("_EFD", "_FD")):
    return ndim - 2
  if ".attention." in name or ".ff." in name:
    return ndim - 2 if name.endswith((".out.kernel", ".down.kernel")) else ndim - 1
  return None
