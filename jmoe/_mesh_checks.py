"""Whether a layer can be split as its table says: sizes against the mesh's.

Like all checks before anything is traced, and so on every process of a job before the
first of them waits for another.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax

from jmoe._call_checks import activations
from jmoe.contexts import with_rows
from jmoe.parallel import mesh as meshes
from jmoe.parallel.rules import letters, product, split_dims
from jmoe.types import Context
from jmoe.use import fact, shown


def over_mesh(config: Any, x: Any, context: Any, train: bool, axes: Any) -> None:
  """Raises if a layer with a table cannot run over the current mesh."""
  rules = config.sharding
  mesh = meshes.current()
  if mesh is None:
    if rules is not None:
      meshes.refuse_entered(rules)
    return
  if rules is None:
    _by_type(config, x, mesh)
    return
  sizes = mesh.shape
  manual = [a for a in meshes.manual_axes(mesh) if a in rules.named]
  if manual:
    raise ValueError(
      f"sharding={shown(rules)} inside shard_map over {manual[0]!r}: the layer makes "
      "its own; call it outside, or use sharding=None and axes=."
    )
  if axes is not None:
    raise ValueError(
      f"axes={axes!r} with sharding={shown(rules)}: the table says which axes split "
      "the tokens; use axes=None."
    )
  fits(config, x, context, train, sizes)


def _by_type(config: Any, x: Any, mesh: Any) -> None:
  """Raises where the types of a layer without a table split its tokens."""
  if not meshes.has_explicit(mesh) or fact(config.router, "dense"):
    return
  at = jax.typeof(x).sharding.spec
  if any(at[: x.ndim - 1]):
    raise ValueError(
      f"x is split over the current mesh by its type, {at}, but sharding=None does not "
      "say how to route over devices; use MoEConfig(sharding=jmoe.parallel.EXPERT_FSDP)"
      ", or a mesh with axes of type Auto."
    )


def fits(config: Any, x: Any, context: Any, train: bool, sizes: Any) -> None:
  """Raises if a mesh of such sizes cannot split a layer as its table says."""
  if not set(config.sharding.named) & set(sizes):
    raise ValueError(
      f"sharding={shown(config.sharding)} names no axis of the mesh {tuple(sizes)}; "
      "rename the table's axes, or use sharding=None."
    )
  _experts(config, sizes)
  _matrices(config, sizes)
  _tokens(config, x, context, sizes)
  check = fact(config.dispatch, "fits_mesh")
  if check is not None:
    check(config, x.shape, context, train, sizes)


def of_shape(config: Any, shape: Sequence[int], dtype: Any, sizes: Any) -> Context:
  """What a call in training knows by its shape alone; raises as the call would."""
  x = jax.ShapeDtypeStruct(tuple(shape), dtype)
  activations(x, config)
  lead, size = x.shape[:-1], config.group_size
  if size == "row":
    size = math.prod(lead) // math.prod(lead[:-1])
  context = dataclasses.replace(with_rows(None, lead), group_size=size)
  fits(config, x, context, True, sizes)
  return context


def _axes(config: Any, name: str, sizes: Any) -> tuple[str, ...]:
  return config.sharding.axes(name, sizes)


def _said(axes: tuple[str, ...], sizes: Any) -> str:
  return ", ".join(f"{a}={sizes[a]}" for a in axes)


def multiples(value: int, parts: int) -> list[int]:
  """The nearest multiples of a number of parts, but for zero."""
  below, above = value // parts * parts, -(-value // parts) * parts
  return [below, above] if below else [above]


def near(value: int, parts: int) -> str:
  """The same in words."""
  return " or ".join(map(str, multiples(value, parts)))


def _experts(config: Any, sizes: Any) -> None:
  axes, rules = _axes(config, "expert", sizes), config.sharding
  E, n = config.num_experts, product(axes, sizes)
  _tokens_split_too(config, axes, sizes)
  if rules.placement is not None:
    _placement(config, axes, n)
    return
  if E % n:
    divisors = [str(d) for d in range(1, E + 1) if E % d == 0]
    raise ValueError(
      f"num_experts={E} is not divisible by the expert axes ({_said(axes, sizes)}); "
      f"use {near(E, n)} experts, axes of {' or '.join(divisors[E > 1 :])}, or "
      "experts.layout.replicate."
    )


def _tokens_split_too(config: Any, axes: tuple[str, ...], sizes: Any) -> None:
  """Raises where devices of the expert axes would have the same tokens."""
  whole = "tokens", "sequence"
  outside = [a for a in axes if not any(a in _axes(config, n, sizes) for n in whole)]
  if outside and not fact(config.dispatch, "gspmd"):
    raise ValueError(
      f"sharding: expert axis {outside[0]!r} does not split the tokens, so there is "
      "nothing to exchange; add it to Rules(tokens=...)."
    )


def _placement(config: Any, axes: tuple[str, ...], n: int) -> None:
  placement, E = config.sharding.placement, config.num_experts
  taken = inspect.signature(config.dispatch.function).parameters
  if not fact(config.dispatch, "exchanges") or "placement" not in taken:
    why = "knows no copies" if "axis" in taken else "exchanges no rows"
    raise ValueError(
      f"sharding.placement with dispatch={config.dispatch!r}, which {why}; use "
      "placement=None, or a strategy such as dispatch.all_to_all."
    )
  if config.max_rows is not None:
    raise ValueError(
      f"max_rows={config.max_rows} with sharding.placement: it bounds the rows of "
      "experts, not of their copies; use max_rows=None."
    )
  if sorted(set(placement)) != list(range(E)) or len(placement) % n:
    raise ValueError(
      f"sharding.placement={shown(placement)} must hold every expert of {E} and be a "
      f"multiple of the {n} devices of {axes}; make it with experts.layout.replicate."
    )


def _matrices(config: Any, sizes: Any) -> None:
  """Every dimension that a table splits is a multiple of its axes."""
  from jmoe.parameters import param_shapes

  for part, tree in param_shapes(config).items():
    for name, leaf in _leaves(tree):
      dims = split_dims(part, name, leaf.shape, config.sharding, sizes)
      for at, axes in dims.items():
        size, n = leaf.shape[at], product(axes, sizes)
        if size % n and letters(name)[at] != "E":
          raise ValueError(
            f"params[{part!r}][{name!r}] {leaf.shape} is split by {_said(axes, sizes)} "
            f"over {size}; use {near(size, n)}, or other axes."
          )
  tokens = _axes(config, "tokens", sizes) + _axes(config, "sequence", sizes)
  outside = [a for a in _axes(config, "d_model", sizes) if a not in tokens]
  if outside:
    raise ValueError(
      f"sharding: d_model axis {outside[0]!r} does not split the tokens; add it to "
      "Rules(tokens=...)."
    )
  for part in ("experts", "shared"):
    used = getattr(config, part)
    if used is None or fact(used, "matrices") is not None:
      continue
    split = product(_axes(config, "expert", sizes) if part == "experts" else (), sizes)
    features = [a for a in _axes(config, "d_ff", sizes) if a not in tokens]
    if split > 1 or features:
      raise ValueError(
        f"{part}={used.name} cannot be split over {_said(tuple(sizes), sizes)}: its "
        "experts are not alike; use a table without expert and d_ff, such as FSDP."
      )


def _leaves(tree: Any):
  for name, leaf in tree.items():
    if hasattr(leaf, "shape"):
      yield name, leaf
    else:
      yield from _leaves(leaf)


def _tokens(config: Any, x: Any, context: Any, sizes: Any) -> None:
  """Shards are whole: equal numbers of tokens, and whole groups where they count."""
  lead = x.shape[:-1]
  if not lead:
    raise ValueError(
      f"x has shape {x.shape}: one token, which no mesh splits; expected [T, "
      f"{x.shape[-1]}] or [..., S, {x.shape[-1]}], or use sharding=None."
    )
  parts = _axes(config, "tokens", sizes), _axes(config, "sequence", sizes)
  dims = [(lead[0], parts[0]), (lead[-1], parts[1])]
  if len(lead) == 1:
    dims = [(lead[0], parts[0] + parts[1])]
  for size, axes in dims:
    n = product(axes, sizes)
    if size % n:
      raise ValueError(
        f"x has shape {x.shape}: {size} is not divisible by {_said(axes, sizes)}; use "
        f"{near(size, n)}, or other axes."
      )
  n = product(parts[0] + parts[1], sizes)
  if n > 1 and not fact(config.dispatch, "gspmd"):
    T = math.prod(lead)
    cut = len(lead) > 1 and bool(parts[1])
    _groups(config, T, context, lead[-1] // product(parts[1], sizes) if cut else T // n)


def _groups(config: Any, T: int, context: Any, run: int) -> None:
  """Raises where tokens that compete for slots would lie on several devices.

  Args:
    T: tokens of the call.
    run: how many tokens in a row a device has.
  """
  scoped = any(loss.get("over") == "group" for loss in config.losses)
  limited = config.capacity is not None or config.k is None
  size = context.group_size
  if fact(config.router, "dense"):
    size = T // context.num_rows
  elif not limited and not (scoped and size is not None):
    return
  size = T if size is None else size
  if run % size == 0:
    return
  if fact(config.router, "dense"):
    raise ValueError(
      f"router={config.router!r} mixes whole rows: those of {size} tokens straddle "
      f"shards of {run} tokens in a row; split tokens by rows, with no axis of "
      "Rules(sequence=...) in the mesh, or use fewer axes."
    )
  fits = [str(d) for d in range(run, 0, -1) if run % d == 0]
  raise ValueError(
    f"group_size={config.group_size!r}: groups of {size} tokens straddle shards of "
    f"{run} tokens in a row; use group_size={' or '.join(fits[:4])}, a dropless "
    "dispatch, or fewer axes."
  )
