"""What a step sends whatever its sparse layers do: parameters, gradients, sums."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from experiments.config import Run
from experiments.planning import sharding, work
from experiments.planning.exchanges import Exchange
from experiments.planning.mesh import Mesh


def of_parameters(run: Run, mesh: Mesh, params: Mapping[str, Any]) -> list[Exchange]:
  """What keeps parameters and gradients in step, whatever sparse layers do.

  fsdp gathers each parameter before its use and scatters its gradient; where a
  parameter is whole, its gradient is summed over the axes that divide tokens, in one
  call with others of its layer and dtype.

  Args:
    run: the run.
    mesh: its mesh.
    params: shapes by name, as stored.
  """
  sizes, itemsize = mesh.sizes, jnp.dtype(run.model.dtype).itemsize
  gathered = scattered = summed = 0.0
  reduced: dict[str, float] = {"data": 0.0, "expert": 0.0, "context": 0.0}
  summed_calls: dict[str, dict[Any, int]] = {axis: {} for axis in reduced}
  calls, scatters = 0, 0
  for name, x in params.items():
    spec = sharding.spec(name, x.shape, sizes)
    axes = sharding.axes(spec)
    own = math.prod(x.shape) * x.dtype.itemsize * sharding.share(spec, sizes)
    in_block = name.startswith("segments.")
    layers = x.shape[0] if in_block else 1
    if "fsdp" in axes:
      # Blocks that are made again need their parameters again.
      times = 2 if in_block and run.model.remat is not False else 1
      narrow = min(1.0, itemsize / x.dtype.itemsize)  # they come in the dtype of use
      gathered += times * own * narrow * (mesh.fsdp - 1)
      calls += times * layers
      scattered += own * (mesh.fsdp - 1)
      scatters += layers
    elif mesh.fsdp > 1:
      summed += 2 * own * (mesh.fsdp - 1) / mesh.fsdp
    for axis in reduced:
      if sizes[axis] > 1 and axis not in axes:
        reduced[axis] += 2 * own * (sizes[axis] - 1) / sizes[axis]
        segment = name.split(".")[1] if in_block else ""
        summed_calls[axis][segment, x.dtype] = layers
  found = []
  if mesh.fsdp > 1:
    found += [
      Exchange("parameters", "all_gather", "fsdp", calls, gathered),
      Exchange("gradients", "reduce_scatter", "fsdp", scatters, scattered),
      Exchange("gradients of whole ones", "all_reduce", "fsdp", 1, summed),
    ]
  for axis, size in reduced.items():
    if size:
      sums = sum(summed_calls[axis].values())
      found.append(Exchange("gradients", "all_reduce", axis, sums, size))
  return found


def of_activations(run: Run, mesh: Mesh) -> list[Exchange]:
  """What tensor and context axes send in attention and dense feed-forwards."""
  model, found = run.model, []
  itemsize = jnp.dtype(model.dtype).itemsize
  tokens = run.data.batch * run.data.seq // (mesh.rows * mesh.context)
  one = tokens * model.d_model * itemsize
  again = 1 if model.remat is not False else 0
  if mesh.tensor > 1:
    # After attention and after the feed-forward, and before both in the backward pass.
    calls = (4 + 2 * again) * model.num_layers
    size = 2 * one * (mesh.tensor - 1) / mesh.tensor
    found.append(Exchange("partial sums", "all_reduce", "tensor", calls, calls * size))
  if mesh.context > 1:
    keys = 0.0
    for block, repeat in work.blocks(model):
      heads = block.attention.num_kv_heads or block.attention.num_heads
      width = 2 * heads * work.head_dim(block.attention, model.d_model)
      keys += repeat * tokens * (mesh.context - 1) * width * itemsize / mesh.tensor
    calls = (1 + again) * model.num_layers
    found += [
      Exchange("keys and values", "all_gather", "context", calls, (1 + again) * keys),
      Exchange("their gradients", "reduce_scatter", "context", model.num_layers, keys),
    ]
  return found
