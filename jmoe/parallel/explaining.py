"""`explain`: how a layer lies on a mesh, as a table; no device is needed."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jmoe.parallel import mesh as meshes
from jmoe.parallel.rules import (
  activation_spec,
  bytes_per_device,
  param_specs,
  product,
  spec,
)
from jmoe.use import fact, shown


def explain(
  config: Any,
  sizes: str | Mapping[str, int],
  shape: Sequence[int],
  *,
  dtype: Any = "float32",
  axes: Sequence[str] = meshes.AXES,
  devices_per_node: int | None = None,
) -> str:
  """Each parameter and activation: its shape, its spec, and bytes on one device.

  >>> import jmoe
  >>> config = jmoe.simple(16, 32, num_experts=8, sharding=jmoe.parallel.EXPERT_FSDP)
  >>> print(explain(config, "fsdp=2,expert=4", (8, 64, 16)))
  ... # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
  sort over fsdp=2, expert=4; 64 tokens on each of 8 shards
  experts down_EFD f32[8, 32, 16] PartitionSpec('expert', None, 'fsdp') 2,048 bytes
  ...

  Args:
    config: a layer with a table in `sharding`.
    sizes: of the mesh, as for `mesh.parse`.
    shape: of the activations, `[T,D]` or `[...,S,D]`.
    dtype: of the activations.
    axes: names of mesh axes that are known.
    devices_per_node: warns where groups of experts (`restrict.expert_groups`) would be
      on several nodes; None: not known.

  Raises:
    ValueError: a configuration without a table, or a mesh that cannot be parsed.
  """
  from jmoe.parameters import param_shapes

  sizes, rules = meshes.parse(sizes, axes=axes), config.sharding
  if rules is None:
    raise ValueError(
      f"explain: sharding=None in {shown(config)}; give it a table, as "
      "jmoe.parallel.EXPERT_FSDP."
    )
  at = activation_spec(len(shape), rules, sizes)
  parts = rules.axes("tokens", sizes) + rules.axes("sequence", sizes)
  shards = product(parts, sizes)
  T = math.prod(shape[:-1])
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
  rows = _rows(config, T, shards, product(rules.axes("expert", sizes), sizes))
  if rows is not None:
    activations.append(("rows of experts", (rows * shards, shape[-1]), dtype, flat))
  lines += [_line(*given, sizes=sizes)[0] for given in activations]
  return "\n".join(lines + _warnings(config, sizes, devices_per_node))


def _line(
  name: str, shape: Any, dtype: Any, where: PartitionSpec, sizes: Any
) -> tuple[str, int]:
  dtype = jnp.dtype(dtype)
  size = bytes_per_device(shape, dtype.itemsize, where, sizes)
  kind = f"{dtype.kind}{8 * dtype.itemsize}{list(shape)}"
  return f"{name:<22} {kind:<22} {_shown(where):<44} {size:>12,} bytes", size


def _shown(where: PartitionSpec) -> str:
  return f"PartitionSpec({', '.join(repr(a) for a in where)})"


def _rows(config: Any, T: int, shards: int, n: int) -> int | None:
  """Rows of a device's expert buffer, at most and before they are aligned."""
  if config.k is None or config.capacity is not None:
    return None
  entries = T // shards * config.k
  if not fact(config.dispatch, "exchanges"):
    n = 1
  share = 1.0 if config.max_rows is None else config.max_rows
  return max(1, int(entries * n * share))


def _warnings(config: Any, sizes: Any, devices_per_node: int | None) -> list[str]:
  if devices_per_node is None:
    return []
  E, n = config.num_experts, product(config.sharding.axes("expert", sizes), sizes)
  lines = []
  per_node = E // n * min(devices_per_node, n)
  for used in config.restrict:
    if used.name != "expert_groups":
      continue
    size = E // used.get("num_groups")
    cut = [g for g in range(E // size) if g * size // per_node
           != (g * size + size - 1) // per_node]  # fmt: skip
    if cut:
      lines.append(
        f"warning: {used!r}: {len(cut)} groups of {size} experts lie on several nodes "
        f"of {per_node} experts; use num_groups={E // per_node} or a multiple of it."
      )
  return lines
