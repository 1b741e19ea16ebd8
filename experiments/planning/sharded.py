"""The training step over a mesh, for the compiler: the layer's own, and a loss beside.

Sparse layers run in their `shard_map` by the table of `sharding`, with the strategy
that is asked about.  The loss is a loop over tokens, which XLA would gather, and has a
`shard_map` of its own.  The rest XLA divides by the sharding of its operands.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments.planning import sharding
from jmoe import capacity, dispatch
from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.models import decoder
from jmoe.parallel import rules
from jmoe.use import fact, use

# The planner's names -> the layer's; what is not here is the planner's alone.
STRATEGIES = {
  "local": None,
  "gather experts": None,
  "all_gather": dispatch.all_gather,
  "all_to_all": dispatch.all_to_all,
  "ragged_all_to_all": dispatch.ragged_all_to_all,
  "hierarchical": dispatch.hierarchical,
  "deduplicated": dispatch.deduplicated,
}


def spread(model: ModelConfig, strategy: str, factor: float) -> ModelConfig:
  """The model with sparse layers over a mesh.

  Args:
    model: of one device.
    strategy: of `STRATEGIES`.
    factor: of capacity, of a strategy with buckets in a model without.
  """
  function = STRATEGIES[strategy]

  def one(block: BlockConfig) -> BlockConfig:
    ff = block.ff
    if not isinstance(ff, MoEConfig):
      return block
    given: dict[str, Any] = {"sharding": sharding.RULES}
    if function is not None:
      given["dispatch"] = use(function)
      if fact(use(function), "dropless") is False and ff.capacity is None:
        given["capacity"] = use(capacity.by_factor, factor=factor)
        given["group_size"] = "row"
    return dataclasses.replace(block, ff=dataclasses.replace(ff, **given))

  segments = tuple((tuple(map(one, blocks)), n) for blocks, n in model.segments)
  return dataclasses.replace(model, segments=segments)


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """Within it models are traced for a mesh."""
  axes, cross_entropy = token_axes(mesh), decoder.cross_entropy

  def sharded_loss(x_TD, matrix_DV, target_T, weight_T, **keywords):
    def local(*given):
      loss, nats_T = cross_entropy(*given, **keywords)
      return (jax.lax.psum(loss, axes) if axes else loss), nats_T

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(axes), P(), P(axes), P(axes)),
      out_specs=(P(), P(axes)),
      check_vma=True,
    )(x_TD, matrix_DV, target_T, weight_T)

  with (
    mock.patch.object(decoder, "cross_entropy", sharded_loss),
    jax.set_mesh(mesh),
  ):
    yield


def token_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes of a mesh over which tokens are divided."""
  table = sharding.RULES
  return table.axes("tokens", mesh.shape) + table.axes("sequence", mesh.shape)


def rows(mesh: Mesh) -> NamedSharding:
  """Of a batch [B,S]."""
  return NamedSharding(mesh, rules.activation_spec(3, sharding.RULES, mesh.shape))


def placed(state: Any, mesh: Mesh) -> Any:
  """Shapes of a `TrainState` with their shardings."""
  from experiments.state import path_part

  sizes, params = dict(mesh.shape), state.params

  def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    param = sharding.like(".".join(map(path_part, path)), x.shape, params)
    spec = P() if param is None else sharding.spec(param, x.shape, sizes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(one, state)
