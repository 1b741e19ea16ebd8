"""A layer over a mesh: its flow under `jax.shard_map`, with the specs of a table.

Each device routes its own tokens.  What is not of one device alone is summed: losses,
loads and drops; what must not depend on the layout is told: a token's position in the
whole batch, by which random numbers are drawn.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec as P

from jmoe.contexts import PER_TOKEN, unique_segments
from jmoe.kernels.varying import over
from jmoe.parallel import mesh as meshes, replaying, rules as tables
from jmoe.parallel.rules import Axes, Rules
from jmoe.parallel.shards import Shards
from jmoe.types import Context, Info
from jmoe.use import fact


@dataclasses.dataclass(frozen=True)
class Over:
  """A table over a mesh: what a layer is split by."""

  rules: Rules
  mesh: AbstractMesh

  @property
  def sizes(self) -> Mapping[str, int]:
    return self.mesh.shape

  def axes(self, name: str) -> Axes:
    """The mesh axes that split a logical axis in more than one."""
    return self.rules.axes(name, self.sizes)

  @property
  def token_axes(self) -> Axes:
    return self.axes("tokens") + self.axes("sequence")

  @property
  def features(self) -> Axes:
    """Axes over which each device has a part of every hidden layer."""
    return tuple(a for a in self.axes("d_ff") if a not in self.token_axes)

  @property
  def num_shards(self) -> int:
    return tables.product(self.token_axes, self.sizes)


def over_mesh(config: Any) -> Over | None:
  """How a layer is split here; None without a table or without a mesh."""
  if config.sharding is None:
    return None
  mesh = meshes.current()
  return None if mesh is None else Over(config.sharding, mesh)


def by_gspmd(config: Any) -> bool:
  """Whether XLA splits the layer by itself, from constraints."""
  return fact(config.dispatch, "gspmd", False)


def exchanges(config: Any) -> bool:
  """Whether the dispatch carries rows over the expert axis; else matrices come here."""
  return bool(fact(config.dispatch, "exchanges"))


def run(
  flow: Callable[..., Any],
  split: Over,
  params: Any,
  x: Array,
  context: Context,
  state: Any,
  key: Any,
  arrays: tuple[Any, ...],
  *,
  config: Any,
  train: bool,
  with_plan: bool,
) -> tuple[Array, Info]:
  """The flow of a layer on every shard of its tokens.

  Args:
    flow: the layer's own, of one device.
    split: the table and the mesh.
    params, x, context, state, key, arrays: as the flow takes them, of the whole call.
    config, train, with_plan: static.

  Returns:
    As the flow: the output split like x; `Info` of the whole call, the same on every
    device.  A plan is split like the tokens, shard by shard; its `order`, `slot`, and
    entries' `token` are those of a shard.
  """
  lead, sizes = x.shape[:-1], split.sizes
  residual, previous_logits, forced = arrays
  context = _of_call(context, lead, split)
  at = tables.activation_spec(x.ndim, split.rules, sizes)
  flat = tables.spec(split.token_axes)  # an entry per token, group or shard
  if previous_logits is not None:
    previous_logits = previous_logits.reshape(*lead, -1)
  forced, at_forced = replaying.of_call(forced, config, lead, at, split)
  at_context = jax.tree.map(lambda _: P(), context)
  per_token = {n: at for n in PER_TOKEN if getattr(context, n) is not None}
  at_context = dataclasses.replace(at_context, **per_token)
  at_params = tables.param_specs(params, split.rules, sizes)
  shards = Shards(
    split.token_axes,
    rows=split.axes("sequence") if len(lead) > 1 else (),
    experts=split.axes("expert") if exchanges(config) else (),
    features=split.features,
    placement=split.rules.placement,
  )

  def body(params, x, context, state, key, arrays):
    from jmoe.parallel.gathering import whole

    params = whole(params, at_params, config, split)
    residual, previous_logits, forced = arrays
    local = x.shape[:-1]
    context = _of_shard(context, local, split, len(lead))
    if previous_logits is not None:
      previous_logits = previous_logits.reshape(math.prod(local), -1)
    forced = replaying.of_shard(forced, config, lead, local, split)
    arrays = residual, previous_logits, forced
    y, info = flow(
      params,
      x,
      context,
      state,
      key,
      arrays,
      config=config,
      train=train,
      axes=shards,
      with_plan=with_plan,
    )
    if with_plan:  # every array of a plan is a shard's own
      plan = jax.tree.map(lambda a: over(a, split.token_axes), info.plan)
      info = dataclasses.replace(info, plan=plan)
    return y, info

  at_info = Info(P(), P(), P(), P(), P(), flat if with_plan else None)  # type: ignore
  args = (params, x, context, state, key, (residual, previous_logits, forced))
  specs = (at_params, at, at_context, P(), P(), (at, at, at_forced))
  if meshes.has_explicit(split.mesh):
    # Shardings are part of types there, and must already be those of the specs.
    args = jax.tree.map(_put, _spread_specs(specs, args), args, is_leaf=_is_spec)
  y, info = jax.shard_map(
    body, mesh=split.mesh, in_specs=specs, out_specs=(at, at_info), check_vma=True
  )(*args)
  return meshes.typed_like(y, x) if meshes.has_explicit(split.mesh) else y, info


def tokens_of_call(token_N: Array, lead: tuple[int, ...], config: Any) -> Array:
  """i32[N] the token of each entry of a plan, counted over the call instead of a shard.

  Args:
    token_N: of `Info.plan` as a layer gave it, over the current mesh or without one.
    lead: the leading dimensions of the activations.
    config: the layer.
  """
  split = over_mesh(config)
  if split is None or by_gspmd(config) or split.num_shards == 1:
    return token_N
  T, entries = math.prod(lead), token_N.shape[0] // split.num_shards
  shard_N = jnp.arange(token_N.shape[0], dtype=jnp.int32) // entries
  if len(lead) == 1:
    return shard_N * (T // split.num_shards) + token_N
  # Shards follow one another: rows, and within them pieces of the sequence.
  across = tables.product(split.axes("sequence"), split.sizes)
  first, piece = shard_N // across, lead[-1] // across
  rows = T // split.num_shards // piece  # of a shard
  row_N, column_N = first * rows + token_N // piece, token_N % piece
  return row_N * lead[-1] + (shard_N % across) * piece + column_N


def constrained(
  flow: Callable[..., Any],
  split: Over,
  params: Any,
  x: Array,
  *rest: Any,
  **static: Any,
) -> tuple[Array, Info]:
  """The flow on whole arrays, of which XLA is told how they are split (GSPMD).

  Args:
    flow, split, params, x: as for `run`; the rest and `static` go on to the flow.
  """
  at = tables.activation_spec(x.ndim, split.rules, split.sizes)
  specs = tables.param_specs(params, split.rules, split.sizes)

  def body(params, x, *rest):
    params = jax.tree.map(jax.lax.with_sharding_constraint, params, specs)
    x = jax.lax.with_sharding_constraint(x, at)
    y, info = flow(params, x, *rest, axes=None, **static)
    return jax.lax.with_sharding_constraint(y, at) if y.shape == x.shape else y, info

  if not meshes.has_explicit(split.mesh):
    return body(params, x, *rest)
  typed = meshes.of_types(at), P()
  automatic: Any = jax.sharding.auto_axes(body, out_sharding=typed)
  y, info = automatic(params, x, *rest)
  return meshes.typed_like(y, x), info


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)


def _spread_specs(specs: Any, args: Any) -> Any:
  """A spec for every array, from a tree of specs that may end earlier."""
  return jax.tree.map(
    lambda at, tree: jax.tree.map(lambda _: at, tree), specs, args, is_leaf=_is_spec
  )


def _put(at: P, x: Array) -> Array:
  return jax.sharding.reshard(x, meshes.of_types(at))


def _of_call(context: Context, lead: tuple[int, ...], split: Over) -> Context:
  """The context of a whole call, its fields shaped like the tokens."""
  T = math.prod(lead)
  changed: dict[str, Any] = {}
  for name in PER_TOKEN:
    array = getattr(context, name)
    if array is None:
      continue
    if name == "segment" and len(lead) > 1 and array.shape == lead:
      # Here, where whole rows are at hand: a document may lie on several shards.
      if meshes.has_explicit(split.mesh):  # and may not be cut by types either
        array = _put(tables.spec(split.axes("tokens")), array)
      array = unique_segments(array.reshape(-1, lead[-1]))
      changed["row_segments"] = lead[-1]
      if context.num_segments is None:
        changed["num_segments"] = T
    changed[name] = array.reshape(lead)
  if context.position is None:
    changed["position"] = jnp.arange(T, dtype=jnp.int32).reshape(lead)
  if context.row is None and context.num_rows is not None:
    if not _whole_rows(context.num_rows, lead, split):
      # Rows that shards cut anywhere are told by name.
      row_T = jnp.arange(T, dtype=jnp.int32) // (T // context.num_rows)
      changed["row"] = row_T.reshape(lead)
  return dataclasses.replace(context, **changed)


def _whole_rows(num_rows: int, lead: tuple[int, ...], split: Over) -> bool:
  """Whether a shard knows its rows by their number alone."""
  if len(lead) > 1 and num_rows == math.prod(lead[:-1]):
    return True  # as many rows, or pieces of rows, as its leading dimensions hold
  if len(lead) > 1 and split.axes("sequence"):
    return False
  return math.prod(lead) // split.num_shards % (math.prod(lead) // num_rows) == 0


def _of_shard(
  context: Context, local: tuple[int, ...], split: Over, rank: int
) -> Context:
  """The same on one shard: flat fields, and its own number of rows."""
  flat = {
    name: getattr(context, name).reshape(-1)
    for name in PER_TOKEN
    if getattr(context, name) is not None
  }
  context = dataclasses.replace(context, **flat)
  if context.row is None and context.num_rows is not None:
    axes = split.axes("tokens") if rank > 1 else split.token_axes
    parts = tables.product(axes, split.sizes)
    context = dataclasses.replace(context, num_rows=context.num_rows // parts)
  size = context.group_size
  if size is not None and math.prod(local) % size:
    # Groups that shards cut: nothing that is left reads them (see `_checks`).
    context = dataclasses.replace(context, group_size=None)
  return context
