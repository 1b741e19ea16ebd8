"""`explain`: how a layer lies on a mesh, as a table; no device is needed."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jmoe._value_checks import float_type, table_of, whole
from jmoe.assign import capacity
from jmoe.parallel import mesh as meshes
from jmoe.parallel.rules import (
  Rules,
  activation_spec,
  bytes_per_device,
  param_specs,
  product,
  spec,
)
from jmoe.use import fact, shown

_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


def explain(
  config: Any,
  sizes: str | Mapping[str, int] | Mesh | AbstractMesh,
  shape: Sequence[int],
  *,
  dtype: Any = "float32",
  axes: Sequence[str] | None = None,
  devices_per_node: int | None = None,
) -> str:
  """Each parameter and activation: its shape, its spec, and bytes on one device.

  >>> import jmoe
  >>> config = jmoe.simple(16, 32, num_experts=8, sharding=jmoe.parallel.EXPERT_FSDP)
  >>> print(explain(config, "fsdp=2,expert=4", (8, 64, 16)))
  ... # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
  sort over fsdp=2, expert=4; 64 tokens on each of 8 shards
  experts down_EFD f32[8, 32, 16] PartitionSpec(('expert', 'fsdp'), ...) 2,048 bytes
  ...

  Args:
    config: a layer with a table in `sharding`.
    sizes: of the mesh, as for `mesh.parse`, or a mesh.
    shape: of the activations, `[T,D]` or `[...,S,D]`.
    dtype: of the activations.
    axes: names of mesh axes that are known; None: `mesh.AXES` and those of the table.
    devices_per_node: warns where groups of experts (`restrict.expert_groups`, those of
      a `restrict.domain`) would be on several nodes; devices are numbered as the mesh
      lists them.  None: not known.

  Raises:
    ValueError: a configuration without a table, a mesh that cannot be parsed, one that
      does not divide the layer or has none of its axes, a shape of no activations, a
      dtype that is no float, or devices of a node that are no positive whole number.
    TypeError: a configuration, sizes or a shape of another type.
  """
  from jmoe._mesh_checks import of_shape
  from jmoe.parameters import param_shapes

  rules = table_of("explain", config)
  if not isinstance(shape, Sequence) or isinstance(shape, str):
    raise TypeError(f"explain: shape={shown(shape)}; give that of x, as (8, 512, 64).")
  if not all(map(whole, shape)):
    raise ValueError(
      f"explain: shape={shown(tuple(shape))} must be whole numbers of at least 1, as "
      "(8, 512, 64)."
    )
  dtype = float_type("explain: dtype", dtype)
  if devices_per_node is not None and not whole(devices_per_node):
    raise ValueError(
      f"explain: devices_per_node={shown(devices_per_node)} must be a whole number of "
      "at least 1, or None."
    )
  known = dict.fromkeys((*meshes.AXES, *rules.named))
  sizes = meshes.sizes_of(sizes, axes or tuple(known))
  context = of_shape(config, shape, dtype, sizes)
  T = math.prod(shape[:-1])
  at = activation_spec(len(shape), rules, sizes)
  parts = rules.axes("tokens", sizes) + rules.axes("sequence", sizes)
  shards = product(parts, sizes)
  over = ", ".join(f"{a}={n}" for a, n in sizes.items())
  lines = [f"{config.dispatch!r} over {over}; {T // shards} tokens on each of {shards} "
           "shards"]  # fmt: skip
  if config.dispatch.kwargs == {}:
    lines[0] = lines[0].replace("()", "", 1)
  shapes = param_shapes(config)
  specs = param_specs(shapes, rules, sizes)
  total = 0
  for (path, leaf), where in zip(
    jax.tree_util.tree_leaves_with_path(shapes),
    jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
    strict=True,
  ):
    name = " ".join(str(step.key) for step in path)
    line, size = _line(name, leaf.shape, leaf.dtype, where, sizes)
    lines.append(line)
    total += size
  lines.append(f"parameters: {total:,} bytes on each device")
  flat = spec(parts)
  E = config.num_experts
  activations = [("x", tuple(shape), dtype, at), ("y", tuple(shape), dtype, at),
                 ("logits", (T, E), "float32", flat)]  # fmt: skip
  if config.k is not None:
    activations.append(("routing weights", (T, config.k), "float32", flat))
  n = product(rules.axes("expert", sizes), sizes)
  rows = _rows(config, T // shards, context.group_size, n)
  if rows is not None:
    activations.append(("rows of experts", (rows * shards, shape[-1]), dtype, flat))
    if (d_ff := config.experts.kwargs.get("d_ff")) is not None:
      features = tuple(a for a in rules.axes("d_ff", sizes) if a not in parts)
      hidden = (
        "hidden of experts",
        (rows * shards, d_ff),
        dtype,
        spec(parts, features),
      )
      activations.append(hidden)
  lines += [_line(*given, sizes=sizes)[0] for given in activations]
  return "\n".join(lines + _warnings(config, sizes, devices_per_node))


def _line(
  name: str, shape: Any, dtype: Any, where: PartitionSpec, sizes: Any
) -> tuple[str, int]:
  dtype = jnp.dtype(dtype)
  size = bytes_per_device(shape, dtype.itemsize, where, sizes)
  kind = f"{_SHORT.get(dtype.name, dtype.name)}{list(shape)}"
  return f"{name:<22} {kind:<22} {_shown(where):<44} {size:>12,} bytes", size


def _shown(where: PartitionSpec) -> str:
  return f"PartitionSpec({', '.join(repr(a) for a in where)})"


def _rows(config: Any, tokens: int, group_size: int | None, n: int) -> int | None:
  """Rows of a device's expert buffer, at most and before they are aligned.

  Args:
    config: of token choice; else None is returned.
    tokens: of a device.
    group_size: tokens that compete for slots; None: all.
    n: devices of the expert axes.
  """
  if config.k is None:
    return None
  entries = tokens * config.k
  if not fact(config.dispatch, "exchanges"):
    n = 1
  if config.capacity is None:
    share = 1.0 if config.max_rows is None else config.max_rows
    bound = max(1, int(entries * n * share))
    if n > 1 and config.dispatch.kwargs.get("own_first"):  # it holds for both buffers
      return min(entries, bound) + min(entries * (n - 1), bound)
    return bound
  size, E = group_size or tokens, config.num_experts
  each = int(capacity.of_group(config.capacity, size, size, E, config.k, True).max())
  copies = config.sharding.placement if n > 1 else None
  slots = len(copies or range(E)) * each * max(1, tokens // size)
  return (
    slots if fact(config.dispatch, "dropless") is False else min(entries * n, slots)
  )


def _groups(config: Any) -> Iterator[tuple[Any, str, int]]:
  """Restrictions that name groups of experts, the keyword that counts them, and E."""
  for used in config.restrict:
    if used.name == "expert_groups":
      yield used, "num_groups", config.num_experts
    elif used.name == "domain":
      yield used, "num_domains", config.num_experts - used.kwargs.get("shared", 0)


def _nodes(rules: Rules, sizes: Mapping[str, int], devices_per_node: int) -> np.ndarray:
  """i64[n,m] the node of each shard of experts, for all m places on other axes."""
  node = np.arange(math.prod(sizes.values())) // devices_per_node
  names, axes = list(sizes), rules.axes("expert", sizes)
  grid = node.reshape(tuple(sizes.values()))
  grid = np.moveaxis(grid, [names.index(a) for a in axes], range(len(axes)))
  return grid.reshape(product(axes, sizes), -1)


def _warnings(
  config: Any, sizes: Mapping[str, int], devices_per_node: int | None
) -> list[str]:
  """Groups of experts that lie on several nodes, whatever a sender's other axes say."""
  if devices_per_node is None:
    return []
  expert_S = np.array(config.sharding.placement or range(config.num_experts))
  experts = config.sharding.axes("expert", sizes)
  last = {a: sizes[a] for a in (*(a for a in sizes if a not in experts), *experts)}

  def cut(owned: int, count: int, sizes: Mapping[str, int] = sizes) -> int:
    """How many of so many equal groups do."""
    node_nM = _nodes(config.sharding, sizes, devices_per_node)
    node_SM = np.repeat(node_nM, len(expert_S) // len(node_nM), axis=0)
    groups = np.arange(owned).reshape(count, -1)
    on = [node_SM[np.isin(expert_S, group)] for group in groups]
    return sum(bool((nodes != nodes[0]).any()) for nodes in on)

  lines = []
  for used, name, owned in _groups(config):
    count = used.get(name)
    if found := cut(owned, count):
      more = [n for n in range(count + 1, owned + 1) if owned % n == 0]
      fitting = [f"{name}={n}" for n in more if not cut(owned, n)][:1]
      moved = [] if cut(owned, count, last) else ["a mesh with the expert axes last"]
      remedies = fitting + moved or ["fewer devices on the expert axes"]
      lines.append(
        f"warning: {used!r}: {found} of {count} groups of {owned // count} experts lie "
        f"on several nodes of {devices_per_node} devices; use {' or '.join(remedies)}."
      )
  return lines
