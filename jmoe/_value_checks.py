"""Whether each stage of a configuration is of its family, and its keywords of theirs.

Read from signatures, so that a new function is checked without a line here: its first
arguments against what the layer passes, its keywords against their annotations.
"""
# SPDX-License-Identifier: Apache-2.0

import inspect
import math
import numbers
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

import jax.numpy as jnp

from jmoe.use import PASSED, Use, fact, shown

# field -> (home of jmoe's own functions, what the layer passes by position)
FAMILIES: dict[str, tuple[str, str]] = {
  "input_noise": ("jmoe.noise", "x_TD"),
  "gate": ("jmoe.gates", "params, x_TD, context"),
  "logit_noise": ("jmoe.noise", "logits_TE"),
  "score": ("jmoe.score", "logits_TE"),
  "select_noise": ("jmoe.noise", "logits_TE"),
  "restrict": ("jmoe.restrict", "select_TE, context"),
  "router": ("jmoe.routers", "logits, scores, select"),
  "priority": ("jmoe.assign.priority", "routing, context"),
  "capacity": ("jmoe.assign.capacity", "tokens, num_experts, k"),
  "renormalise": ("jmoe.assign.renormalise", "plan"),
  "dispatch": ("jmoe.dispatch", "x_TD, plan, experts, home"),
  "experts": ("jmoe.experts", "params, rows"),
  "combine": ("jmoe.combine", "plan"),
  "aggregate": ("jmoe.aggregate", "params, y_TKD, plan, x_TD, residual_TD"),
  "shared": ("jmoe.experts", "params, rows"),
  "join": ("jmoe.join", "params, y_TD, shared_TD, x_TD"),
  "losses": ("jmoe.losses", "plan, context"),
  "balance": ("jmoe.balance", "bias_E, load_E"),
}
# keyword of jmoe's functions -> the same for a function within a function
_WITHIN: dict[str, tuple[str, str]] = {
  "base": ("jmoe.experts", "params, rows"),
  "initializer": ("jmoe.initializers", "key, shape, dtype"),
  "activation": ("jax.nn", "x"),
  "matmul": ("jmoe.kernels", "x_RD, w_EDF, groups, bias"),
  "rule": ("jmoe.assign.capacity", "tokens, num_experts, k, factor"),
  "eval_rule": ("jmoe.assign.capacity", "tokens, num_experts, k, factor"),
}
_COUNTS = ("num_", "d_", "slots_per_", "vocab_size", "block", "multiple_of")


def positive(name: str, value: Any) -> None:
  """Raises unless a value is a whole number of at least one."""
  if not whole(value):
    raise ValueError(f"{name}={shown(value)} must be a whole number of at least 1.")


def whole(value: Any) -> bool:
  """Whether a value is a whole number of at least one."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return whole and value >= 1  # type: ignore[operator]


def finite_positive(name: str, value: Any, remedy: str = "") -> None:
  """Raises unless a value is a positive, finite number."""
  good = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not good or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type]
    raise ValueError(f"{name}={shown(value)} must be a positive number{remedy}.")


def float_type(name: str, value: Any) -> Any:
  """The dtype of a name or type; raises unless it is a float."""
  try:
    found = jnp.dtype(value)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise ValueError(
      f"{name}={shown(value)} is no float dtype; use 'float32' or 'bfloat16'."
    )
  return found


def table_of(called: str, config: Any) -> Any:
  """The table of a layer's configuration; raises if this is none, or has none."""
  if not hasattr(config, "sharding") or not hasattr(config, "experts"):
    raise TypeError(
      f"{called}: {shown(config)} is no layer's configuration; give a MoEConfig."
    )
  if config.sharding is None:
    raise ValueError(
      f"{called}: sharding=None in {shown(config)}; give it a table, as "
      "jmoe.parallel.EXPERT_FSDP."
    )
  return config.sharding


def family(field: str, use: Use) -> None:
  """Raises unless a function can stand at this stage of the flow.

  Args:
    field: of `MoEConfig`.
    use: what it was given.

  Raises:
    TypeError: it belongs to another stage, or takes other arguments.
  """
  _stage(field, use, *FAMILIES[field])


def _stage(field: str, use: Use, home: str, passed: str) -> None:
  module = _module(use)
  homes = {name for name, _ in FAMILIES.values()}
  if not _within(module, home) and any(_within(module, name) for name in homes):
    raise TypeError(f"{field}={use!r} is of {module}; use a function of {home}.")
  parameters = _parameters(use.function)
  if parameters is None:
    return
  given = passed.count(",") + 1
  places = [p for p in parameters.values() if p.kind in _BY_POSITION]
  least, most = sum(p.default is p.empty for p in places), len(places)
  if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
    most = max(most, given)
  if not least <= given <= most:
    raise TypeError(
      f"{field}={use!r} is called with ({passed}), but takes {_counted(least, most)} "
      f"by position; use a function of {home} or one like them."
    )


def _module(use: Use) -> str:
  return getattr(use.function, "__module__", None) or ""


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
  try:
    return inspect.signature(function).parameters
  except (TypeError, ValueError):  # a builtin without a signature
    return None


_BY_POSITION = (
  inspect.Parameter.POSITIONAL_ONLY,
  inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def keywords(use: Use) -> None:
  """Raises unless every keyword, also of a `use` within, is what its function says.

  Raises:
    ValueError: a number, string or truth value of another kind than the parameter's
      annotation, or a count below one.
    TypeError: no function where one is needed.
  """
  known = dict(_parameters(fact(use, "init")) or {})
  known |= _parameters(use.function) or {}
  for name, value in use.keywords:
    parameter = known.get(name)
    if parameter is not None and name not in PASSED:
      _keyword(f"{use.name}: {name}", name, value, parameter)
    if name in _WITHIN and _within(_module(use), "jmoe"):
      if callable(value):
        inner = value if isinstance(value, Use) else Use(value)
        _stage(f"{use.name}: {name}", inner, *_WITHIN[name])
    if isinstance(value, Use):
      keywords(value)


def _keyword(where: str, name: str, value: Any, parameter: inspect.Parameter) -> None:
  kind = parameter.annotation
  if kind is parameter.empty:
    kind = Callable if callable(parameter.default) else Any
  count = name == "k" or name.startswith(_COUNTS)
  if _is(value, kind) and not (count and isinstance(value, int) and value < 1):
    return
  wanted = _said(kind)
  if count:
    wanted = wanted.replace("a whole number", "a whole number of at least 1")
  error = TypeError if "function" in wanted else ValueError
  raise error(f"{where}={shown(value)} must be {wanted}.")


def _is(value: Any, kind: Any) -> bool:
  if get_origin(kind) in (Union, types.UnionType):
    return any(_is(value, one) for one in get_args(kind))
  if kind is None or kind is type(None):
    return value is None
  if kind is bool:
    return isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if get_origin(kind) is tuple:
    one = get_args(kind)[0]
    return isinstance(value, tuple) and all(_is(v, one) for v in value)
  if kind is Callable or get_origin(kind) is Callable:
    return callable(value)
  if kind in (str, Use):
    return isinstance(value, kind)
  return True  # nothing that can be said


def _said(kind: Any) -> str:
  if get_origin(kind) in (Union, types.UnionType):
    return " or ".join(_said(one) for one in get_args(kind))
  if get_origin(kind) is tuple:
    return f"a tuple, each {_said(get_args(kind)[0])}"
  known = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Use: "use(function, ...)",
    None: "None",
    type(None): "None",
  }
  return known.get(kind, "a function")


def _within(module: str, home: str) -> bool:
  return module == home or module.startswith(home + ".")


def _counted(least: int, most: int) -> str:
  return str(most) if least == most else f"{least} to {most}"
