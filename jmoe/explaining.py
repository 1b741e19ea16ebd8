"""`explain`: what a configured layer will do, as a short table; nothing is computed.

Beside the flow: stages with their calls, slots, rows, parameters, and which grouped
matmul serves the device.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe import checks, dispatch, layer
from jmoe.config import MoEConfig
from jmoe.contexts import PER_TOKEN
from jmoe.kernels import devices
from jmoe.kernels.grouped_matmul import choose
from jmoe.losses import loss_name
from jmoe.types import Context, Groups, Rows
from jmoe.use import Use, fact, shown, use

_WIDTH = 46  # of a call; a longer one takes a line of its own


class _Seen(NamedTuple):
  """What a trace of the layer shows."""

  entries: int  # assignments
  groups: int  # routing groups
  slots: Any  # of an expert in a group; None: dropless
  rows: int  # of the expert buffer
  layout: Groups  # static fields only


def explain(
  config: MoEConfig,
  num_tokens: int = 4096,
  *,
  train: bool = False,
  device: str | None = None,
  num_rows: int = 1,
  dtype: Any = "float32",
) -> str:
  """A table of the layer in the order in which a token meets its stages.

  >>> import jmoe
  >>> config = jmoe.simple(16, 32, num_experts=4, k=1, capacity_factor=1.25)
  >>> text = jmoe.explain(config, 64, device="cpu")
  >>> print(text)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
  MoE layer, d_model=16, 4 experts, 64 tokens outside training, on cpu
  gate         linear()
  ...
  capacity     by_factor(eval_factor=None, factor=1.25)      20 slots for each expert
  ...

  Args:
    config: the layer.
    num_tokens: T of a call, padding included.
    train: capacity factors of training, and its noise.
    device: "cpu", "gpu", "ampere" (compute capability 8.0 and up), "hopper" or "tpu";
      None: jax's default.
    num_rows: sequences or images that the tokens make, for routing by row.
    dtype: of the activations.

  Returns:
    A few lines of text.  `rows` are those of the expert buffer; divided by the
    assignments they bound the computation from above, since implementations that skip
    empty blocks do less.

  Raises:
    ValueError, TypeError: an argument that is not what it should be.
  """
  x_TD = jax.ShapeDtypeStruct((num_tokens, getattr(config, "d_model", 1)), dtype)
  checks.positive("num_tokens", num_tokens)
  checks.positive("num_rows", num_rows)
  checks.activations(x_TD, config)
  device = {"cuda": "gpu", "rocm": "gpu"}.get(device or "", device)
  device = devices.current_device() if device is None else device
  if device not in devices.DEVICES:
    raise ValueError(
      f"explain: device={device!r}; use one of {', '.join(map(repr, devices.DEVICES))}."
    )
  with devices.as_if(device):
    seen = _trace(config, x_TD, num_rows, train)
  lines = [
    f"MoE layer, d_model={config.d_model}, {config.num_experts} experts, {num_tokens} "
    f"tokens {'in' if train else 'outside'} training, on {device}"
  ]
  for name in _stages(config):
    value = getattr(config, name)
    if name == "losses":
      names = ", ".join(loss_name(loss) for loss in value) or "none"
      lines.append(_line("losses", names, ""))
      continue
    note = _note(name, config, seen, num_tokens, train, device, x_TD.dtype)
    if name == "capacity" and value is None:
      lines.append(_line("capacity", "none", note))
    for one in value if isinstance(value, tuple) else (value,):
      if isinstance(one, Use):
        lines.append(_line(name, shown(one, most=100), note))
  return "\n".join([*lines, _parameters(config, seen, num_tokens)])


def _stages(config: MoEConfig) -> list[str]:
  """The fields that are stages of this layer, in their order."""
  names = [field.name for field in dataclasses.fields(config)]
  if config.shared is None:
    names.remove("join")
  if not fact(config.router, "dense"):
    return names
  soft = ("input_noise", "gate", "router", "dispatch", "experts", "shared", "join")
  return [name for name in names if name in soft]


def _trace(config: MoEConfig, x_TD: Any, num_rows: int, train: bool) -> _Seen:
  """The layer on shapes alone, with experts that only look at their rows."""
  found: dict[str, Rows] = {}

  def experts(params, rows):
    del params
    found["rows"] = rows
    return rows.gathered()

  params = layer.param_shapes(config)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(functools.partial(layer.init_state, config), params, key)
  integer = jax.ShapeDtypeStruct(x_TD.shape[:1], jnp.int32)
  ids = {name: integer for name in PER_TOKEN if name not in ("valid", "row")}
  context = Context(**ids, num_rows=num_rows, num_segments=1)  # type: ignore[arg-type]
  context = checks.call(
    params, x_TD, config, context, state, key, train, None, None, None, None
  )
  # As of segments that were shaped like the rows.
  row = max(1, x_TD.shape[0] // num_rows)
  context = dataclasses.replace(context, row_segments=row)
  looking = config
  if fact(config.dispatch, "in_place"):  # no rows to look at: those it would have
    way = dispatch.sort if config.capacity is None else dispatch.buckets
    looking = dataclasses.replace(config, dispatch=use(way))
  looking = dataclasses.replace(looking, experts=use(experts))
  # The function under the jit: a trace for looking has no place in its cache.
  call = functools.partial(
    inspect.unwrap(layer._moe),
    config=looking,
    train=train,
    axes=None,
    with_plan=True,
    device=devices.current_device(),
  )
  none = (None, None, None)
  _, info = jax.eval_shape(call, params, x_TD, context, state, key, none)
  rows, plan = found["rows"], info.plan
  num = rows.x.shape[0] if rows.layout is None else rows.layout.num_rows
  static = _static(rows.groups.block, rows.groups.capacity)
  if hasattr(plan, "routing"):
    entries, groups = plan.routing.expert.shape[0], plan.load.shape[0]
    return _Seen(entries, groups, plan.capacity, num, static)
  G, _, E, C = plan.dispatch.shape
  return _Seen(G * E * C, G, C, num, static)


def _static(block: int, capacity: int | None) -> Groups:
  """Groups of which only the static fields will be read."""
  nothing: Any = None
  return Groups(nothing, nothing, block, capacity)


def _note(
  name: str,
  config: MoEConfig,
  seen: _Seen,
  num_tokens: int,
  train: bool,
  device: str,
  dtype: Any,
) -> str:
  if name.endswith("_noise") and not train:
    return "only in training"
  limited = seen.slots is not None
  if name == "router" and fact(config.router, "dense"):
    return f"{seen.slots} slots for each expert and row, each an average of its tokens"
  if name == "router":
    mean = seen.entries / num_tokens
    return f"{mean:.4g} of {config.num_experts} experts for each token" + (
      "" if config.k is not None else ", on average"
    )
  if name == "priority" and not (limited or config.max_rows is not None):
    return "without effect, nothing is dropped"
  if name == "capacity":
    return _slots(config, seen)
  in_place = fact(config.dispatch, "in_place")
  if name == "dispatch" and in_place:
    return "no rows; every hidden unit of every token, most of them times zero"
  if name == "experts" and in_place:
    return "plain products"
  if name == "dispatch":
    times = seen.rows / max(seen.entries, 1)
    return f"{seen.rows} rows, {times:.2f} x {seen.entries} assignments"
  if name == "experts":
    return _matmul(config.experts, seen.layout, config.num_experts, device, dtype)
  if name == "shared" and config.shared is not None:
    one = _static(1, num_tokens)
    return "every token; " + _matmul(config.shared, one, 1, device, dtype)
  return ""


def _slots(config: MoEConfig, seen: _Seen) -> str:
  if seen.slots is None and config.max_rows is not None:
    return f"dropless up to max_rows={config.max_rows} of all assignments"
  if seen.slots is None:
    return "dropless"
  slots = seen.slots
  if isinstance(slots, tuple):
    slots = f"{min(slots)} to {max(slots)}"
  where = f" in each of {seen.groups} groups" if seen.groups > 1 else ""
  return f"{slots} slots for each expert{where}"


def _matmul(
  experts: Use, groups: Groups, num_experts: int, device: str, dtype: Any
) -> str:
  """Which grouped matmul runs, and why."""
  while "base" in experts.kwargs:  # experts around others
    free = sum(experts.kwargs.get(n, 0) for n in ("constant", "copy", "zero"))
    experts, num_experts = experts.kwargs["base"], num_experts - free
  if fact(experts, "matrices") is None:
    return ""
  given = experts.kwargs.get("matmul")
  if given is not None:
    return f"matmul: {given!r}, as configured"
  name, why, slow = choose(device, groups, num_experts, dtype)
  return f"matmul: {name} ({why}{'; slow' if slow else ''})"


def _parameters(config: MoEConfig, seen: _Seen, num_tokens: int) -> str:
  shapes = layer.param_shapes(config)

  def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  total, routed = count(shapes), count(shapes.get("experts", {}))
  share = min(1.0, seen.entries / (num_tokens * config.num_experts))
  active = round(total - routed + share * routed)
  return f"{total:,} parameters, {active:,} active for a token ({config.param_dtype})"


def _line(stage: str, call: str, note: str) -> str:
  if len(call) > _WIDTH and note:
    return f"{stage:<12} {call}\n{'':<12} {'':<{_WIDTH}} {note}"
  return f"{stage:<12} {call:<{_WIDTH}} {note}".rstrip()
