"""What a model does over a mesh outside its sparse layers: activations and the loss.

Attention and dense layers XLA splits by itself (GSPMD), from the shardings of their
parameters and from constraints on activations.  Where arrays carry their shardings in
their types (AxisType.Explicit) a model's methods leave that to XLA all the same, and
what they give has types again.  The loss is a loop over tokens, which XLA would gather:
here each device sums over its own.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec as P

from jmoe.kernels.varying import over
from jmoe.models.cross_entropy import cross_entropy
from jmoe.parallel import mesh as meshes, rules as tables, spmd
from jmoe.parallel.rules import Axes, Rules
from jmoe.types import Mixing, Plan


def activations(x_BSD: Array, rules: Rules | None) -> Array:
  """The same array, split by rows and sequence over the current mesh, if there is one.

  Without it XLA may follow the matrices, split d_model over the axis of FSDP, and sum
  outputs of every product over it.
  """
  mesh = _mesh(rules)
  if mesh is None or rules is None:
    return x_BSD
  at = tables.activation_spec(x_BSD.ndim, rules, mesh.shape)
  return lax.with_sharding_constraint(x_BSD, at)


def embedded(table_VD: Array, tokens_BS: Array, rules: Rules | None) -> Array | None:
  """[B,S,D] rows of a table over the current mesh; None if there is none.

  Each device looks up its own tokens in the whole table, whose gradient is summed and
  split again.  XLA would add up rows split over d_model, and move all of them for it.

  Args:
    table_VD: split as the table of rules says.
    tokens_BS: i32[B,S].
    rules: the table of rules.
  """
  mesh = _mesh(rules)
  if mesh is None or rules is None:
    return None
  sizes = mesh.shape
  rows, sequence = rules.axes("tokens", sizes), rules.axes("sequence", sizes)
  at, axes = tables.spec(rows, sequence), rows + sequence
  names = [rules.axes(name, sizes) for name in ("vocab", "d_model")]

  def local(table_VD, tokens_BS):
    table_VD = _gathered(table_VD, split, axes)
    return jnp.take(table_VD, tokens_BS, axis=0)

  split = _split(names, axes)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(tables.spec(*split), at),
    out_specs=tables.spec(rows, sequence, ()),
    check_vma=True,
  )(table_VD, tokens_BS)


def whole_plan(plan: Plan | Mixing, lead: tuple[int, ...], config: Any) -> Any:
  """A layer's plan with its entries' tokens counted over the call, not over a shard.

  Args:
    plan: in `Info.plan`.
    lead: the leading dimensions of the activations.
    config: the layer.
  """
  if isinstance(plan, Mixing):
    return plan
  token_N = spmd.tokens_of_call(plan.routing.token, lead, config)
  routing = dataclasses.replace(plan.routing, token=token_N)
  return dataclasses.replace(plan, routing=routing)


def loss(
  x_BSD: Array,
  matrix_DV: Array,
  target_BS: Array,
  weight_BS: Array,
  rules: Rules | None,
  **keywords: Any,
) -> tuple[Array, Array] | None:
  """(f32[] weighted sum, f32[B,S] nats) over the current mesh; None if there is none.

  Axes that split the vocabulary split the sequence here, if they divide it: each device
  then has the logits of fewer tokens, and the whole matrix for them.

  Args:
    x_BSD: behind the last norm.
    matrix_DV: into the vocabulary, split as the table says.
    target_BS: i32[B,S].
    weight_BS: f32[B,S] of each token in the sum.
    rules: the table.
    **keywords: of `cross_entropy`.
  """
  mesh = _mesh(rules)
  if mesh is None or rules is None:
    return None
  sizes = mesh.shape
  rows, sequence = rules.axes("tokens", sizes), rules.axes("sequence", sizes)
  d_model, vocab = rules.axes("d_model", sizes), rules.axes("vocab", sizes)
  more = tuple(a for a in vocab if a not in rows + sequence)
  if more and x_BSD.shape[1] % tables.product(sequence + more, sizes) == 0:
    sequence += more
  at, axes = tables.spec(rows, sequence), rows + sequence
  split = _split((d_model, vocab), axes)

  def local(x_BSD, matrix_DV, target_BS, weight_BS):
    matrix_DV = _gathered(matrix_DV, split, axes)
    each = x_BSD.reshape(-1, x_BSD.shape[-1]), matrix_DV, target_BS, weight_BS
    each = *each[:2], *(x.reshape(-1) for x in each[2:])
    total, nats_T = cross_entropy(*each, **keywords)
    return lax.psum(total, axes) if axes else total, nats_T.reshape(target_BS.shape)

  specs = (tables.spec(rows, sequence, ()), tables.spec(*split), at, at)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=specs,
    out_specs=(tables.spec(), at),
    check_vma=True,
  )(x_BSD, matrix_DV, target_BS, weight_BS)


def _split(dims: Sequence[Axes], axes: Axes) -> list[Axes]:
  """The axes of each dim that split tokens too; by the others XLA gathers before."""
  return [tuple(a for a in names if a in axes) for names in dims]


def _gathered(matrix: Array, split: Sequence[Axes], axes: Axes) -> Array:
  """The whole matrix, from a device's part."""
  # Differing before it is gathered: its gradient is split first and summed then.
  matrix = over(matrix, axes)
  for dim, names in enumerate(split):
    if names:
      matrix = lax.all_gather(matrix, names, axis=dim, tiled=True)
  return matrix


def by_xla(results: Callable[..., Any]) -> Callable[..., Any]:
  """Decorator of a model's method, for meshes with axes of AxisType.Explicit.

  There the method runs with axes of type Auto.  Without a table it runs as it is.

  Args:
    results: `(rows and sequence, axes each) -> specs` of what it returns, a tree that
      may end earlier.
  """

  def decorated(method):
    @functools.wraps(method)
    def call(self, *args, **keywords):
      rules, mesh = self.config.sharding, meshes.current()
      if rules is None or mesh is None or not meshes.has_explicit(mesh):
        return method(self, *args, **keywords)
      sizes = mesh.shape
      at = rules.axes("tokens", sizes), rules.axes("sequence", sizes)
      graph, state = nnx.split(self)
      leaves, tree = jax.tree.flatten((args, keywords))
      arrays = [n for n, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

      def body(state, *given):
        full = list(leaves)
        for n, array in zip(arrays, given, strict=True):
          full[n] = array
        args, keywords = jax.tree.unflatten(tree, full)
        return method(nnx.merge(graph, state), *args, **keywords)

      out = results(*(tuple(a for a in axes if meshes.is_explicit(a)) for axes in at))
      automatic: Any = jax.sharding.auto_axes(body, out_sharding=out)
      return automatic(state, *(jnp.asarray(leaves[n]) for n in arrays))

    return call

  return decorated


def of_hidden(rows: Axes, sequence: Axes) -> Any:
  """Of `Decoder.hidden`."""
  return tables.spec(rows, sequence, ()), P()


def of_logits(rows: Axes, sequence: Axes) -> Any:
  """Of `Decoder.logits`."""
  return tables.spec(rows, sequence, ())


def of_loss(rows: Axes, sequence: Axes) -> Any:
  """Of `Decoder.cross_entropy`."""
  return P(), tables.spec(rows, sequence)


def _mesh(rules: Rules | None) -> Any:
  """The current mesh, where a model's table applies to it."""
  mesh = None if rules is None else meshes.current()
  if mesh is None:
    if rules is not None:
      meshes.refuse_entered(rules)
    return None
  if AxisType.Auto not in mesh.axis_types:
    raise ValueError(
      f"ModelConfig(sharding=...) inside shard_map over {mesh.axis_names}: the model "
      "makes its own; call it outside, or use sharding=None."
    )
  return mesh
