"""The training step over a mesh, for the compiler: tokens divided, parameters gathered.

Grouped matmuls cannot be divided by XLA itself, and a sort over all tokens should not
be.  So a sparse layer and the loss run in `jax.shard_map` over the axes that divide
tokens: each device routes its own, as in data parallelism, and gathers the matrices of
one layer at a time.  The rest XLA divides by the sharding of its operands.
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
from jmoe import contexts, layer
from jmoe.models import decoder


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """Within it models are traced for a mesh, whose axes are those of `sharding`."""
  axes = token_axes(mesh)
  apply, cross_entropy = layer.apply, decoder.cross_entropy

  def sharded_apply(params, x_BSD, config, *, context, state, key, train, **rest):
    assert not any(value is not None for value in rest.values() if value is not False)
    specs = _specs("segments.0.0.moe", params, mesh)
    tokens = {
      name: getattr(context, name)
      for name in contexts.PER_TOKEN
      if getattr(context, name) is not None
    }
    whole = dataclasses.replace(context, num_rows=None, **dict.fromkeys(tokens))

    def local(params, x_BSD, tokens, whole, state, key):
      params = jax.tree.map(_gathered, params, specs)
      context = dataclasses.replace(whole, num_rows=x_BSD.shape[0], **tokens)
      y_BSD, info = apply(
        params,
        x_BSD,
        config,
        context=context,
        state=state,
        key=key,
        train=train,
        axes=axes,
      )
      mean = lambda x: jax.lax.pmean(x, axes)  # noqa: E731
      info = dataclasses.replace(
        info, losses=jax.tree.map(mean, info.losses), entropy=mean(info.entropy)
      )
      return y_BSD, info

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(specs, P(axes), P(axes), P(), P(), P()),
      out_specs=(P(axes), P()),
      check_vma=False,  # megablox does not say over which axes its results differ
    )(params, x_BSD, tokens, whole, state, key)

  def sharded_loss(x_TD, matrix_DV, target_T, weight_T, **keywords):
    spec = sharding.spec("unembed.kernel", matrix_DV.shape, dict(mesh.shape))

    def local(x_TD, matrix_DV, *each):
      matrix_DV = _gathered(matrix_DV, spec)
      loss, nats_T = cross_entropy(x_TD, matrix_DV, *each, **keywords)
      return jax.lax.psum(loss, axes), nats_T

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(axes), spec, P(axes), P(axes)),
      out_specs=(P(), P(axes)),
      check_vma=False,
    )(x_TD, matrix_DV, target_T, weight_T)

  with (
    mock.patch.object(layer, "apply", sharded_apply),
    mock.patch.object(decoder, "cross_entropy", sharded_loss),
  ):
    yield


def token_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes of a mesh over which rows are divided."""
  return tuple(name for name in mesh.axis_names if name in sharding.TOKENS)


def placed(state: Any, mesh: Mesh) -> Any:
  """Shapes of a `TrainState` with their shardings."""
  sizes, params = dict(mesh.shape), state.params

  def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    name = ".".join(map(_part, path))
    param = sharding.like(name, x.shape, params)
    spec = P() if param is None else sharding.spec(param, x.shape, sizes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(one, state)


def _part(entry: Any) -> str:
  from experiments.state import path_part

  return path_part(entry)


def _specs(prefix: str, params: Any, mesh: Mesh) -> Any:
  """Of one layer's parameters: those of the stack, without its first dim."""
  sizes = dict(mesh.shape)

  def one(path: Any, x: Any) -> P:
    name = ".".join([prefix, *map(_part, path)])
    return P(*sharding.spec(name, (1, *x.shape), sizes)[1:])

  return jax.tree_util.tree_map_with_path(one, params)


def _gathered(x: Any, spec: P) -> Any:
  """The whole of an array that a device has a part of."""
  for dim, axis in enumerate(spec):
    if axis is not None:
      x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
  return x
