"""Bad input: said in one line, before anything is traced or compiled.

Every message names the argument, its value and the remedy.  Here: whether the fields of
a configuration can work, alone and together.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import _value_checks
from jmoe._call_checks import (
  activations as activations,
  call as call,
  flag as flag,
  layer_of as layer_of,
  params as params,
  random_key as random_key,
)
from jmoe._model_checks import model_config as model_config
from jmoe.losses.total import loss_name
from jmoe.use import Use, fact as fact, nearest, shown

_ONE = ("gate", "score", "router", "priority", "renormalise", "dispatch", "experts")
_ONE += ("combine", "join")
_MAYBE = ("input_noise", "logit_noise", "select_noise", "capacity", "aggregate")
_MAYBE += ("shared", "balance")
_MANY = ("restrict", "losses")
_NOT_SOFT = ("logit_noise", "select_noise", "restrict", "capacity", "max_rows")
_NOT_SOFT += ("aggregate", "losses", "balance")
_C = TypeVar("_C", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])


def known_fields(
  cls: type,
  names: Iterable[str],
  also: Callable[..., Any] | None = None,
  where: str | None = None,
) -> None:
  """Raises on a keyword that neither the class nor the function takes.

  Args:
    cls: a dataclass.
    names: the keywords given.
    also: a function that passes keywords on to the class.
    where: what was called, for the message; None: the function, or the class.
  """
  known = {f.name for f in dataclasses.fields(cls) if f.init}
  for p in inspect.signature(also).parameters.values() if also else ():
    known |= {p.name} if p.kind is not p.VAR_KEYWORD else set()
  for name in names:
    if name not in known:
      called = where or (also or cls).__name__
      raise TypeError(f"{called}: unknown keyword {name!r}; {nearest(name, known)}")


def named(cls: _C) -> _C:
  """Class decorator: an unknown keyword is answered with the nearest known one.

  NumPy scalars become Python's, so that equal values are equal in JSON too.
  """
  init = cls.__init__

  @functools.wraps(init)
  def checked(self, *args: Any, **keywords: Any) -> None:
    known_fields(cls, keywords)
    init(self, *_plain(args), **{k: _plain(v) for k, v in keywords.items()})

  cls.__init__ = checked
  return cls


def _plain(value: Any) -> Any:
  if isinstance(value, np.generic):
    return value.item()
  return tuple(map(_plain, value)) if type(value) is tuple else value


def named_like(cls: type, **makes: tuple[str, ...]) -> Callable[[_F], _F]:
  """Decorator: the same for a function that passes keywords on to a class.

  Args:
    cls: the class.
    **makes: a field of it -> the function's own parameters that this field is made of.
      Given beside the field they would be lost, so the call is refused.
  """

  def decorate(function: _F) -> _F:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
      known_fields(cls, keywords, also=function)
      given = signature.bind_partial(*args, **keywords).arguments
      for field, parts in makes.items():
        lost = [name for name in parts if given.get(name) is not None]
        if lost and field in keywords:
          raise TypeError(
            f"{function.__name__}: {' and '.join(lost)} beside {field}="
            f"{shown(keywords[field])}; give one of them, or write "
            f"{cls.__name__}(..., {field}=...)."
          )
      return function(*args, **keywords)

    return checked  # type: ignore[return-value]

  return decorate


def positive(name: str, value: Any) -> None:
  """Raises unless a value is a whole number of at least one."""
  if not _whole(value):
    raise ValueError(f"{name}={shown(value)} must be a whole number of at least 1.")


def _whole(value: Any) -> bool:
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return whole and value >= 1  # type: ignore[operator]


def finite_positive(name: str, value: Any, remedy: str = "") -> None:
  """Raises unless a value is a positive, finite number."""
  good = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not good or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type]
    raise ValueError(f"{name}={shown(value)} must be a positive number{remedy}.")


def layer_config(config: Any) -> None:
  """Raises if the fields of a `MoEConfig` cannot work, alone or together."""
  positive("d_model", config.d_model)
  positive("num_experts", config.num_experts)
  for name in _ONE + _MAYBE:
    value = getattr(config, name)
    if not isinstance(value, Use) and not (value is None and name in _MAYBE):
      raise TypeError(f"{name}={shown(value)} must be use(function, ...).")
  for name in _MANY:
    value = getattr(config, name)
    if not isinstance(value, tuple) or not all(isinstance(u, Use) for u in value):
      raise TypeError(f"{name}={shown(value)} must be a tuple of use(function, ...).")
  stages = [
    (name, use)
    for name in _ONE + _MAYBE + _MANY
    for use in _tuple(getattr(config, name))
  ]
  for name, use in stages:
    _value_checks.family(name, use)
    _value_checks.keywords(use)
  if not callable(fact(config.router, "choices")):
    raise TypeError(f"router={config.router!r} is no router; see jmoe.routers.")
  if not isinstance(config.rescore, bool):
    raise ValueError(f"rescore={shown(config.rescore)} must be True or False.")
  _dtype(config.param_dtype)
  _own_check(config, config.router)  # others ask it for k
  for _, use in stages:
    _own_check(config, use)
  _together(config)


def _tuple(value: Any) -> tuple[Use, ...]:
  return () if value is None else value if isinstance(value, tuple) else (value,)


def _own_check(config: Any, use: Use) -> None:
  if fact(use, "check"):
    fact(use, "check")(config, **use.kwargs)
  for value in use.kwargs.values():
    if isinstance(value, Use):
      _own_check(config, value)


def _dtype(value: Any) -> None:
  try:
    good = jnp.issubdtype(jnp.dtype(value), jnp.floating)
  except TypeError:
    good = False
  if not good:
    raise ValueError(
      f"param_dtype={shown(value)} is no float dtype; use 'float32' or 'bfloat16'."
    )
  if jnp.dtype(value) != jax.dtypes.canonicalize_dtype(value):
    raise ValueError(
      f"param_dtype={shown(value)} needs jax.config.update('jax_enable_x64', True); "
      "without it parameters would be float32, so use 'float32'."
    )


def _together(config: Any) -> None:
  name, dispatch = config.router.name, config.dispatch.name
  if config.scale not in ("output", "input"):
    raise ValueError(f"scale={shown(config.scale)}; use 'output' or 'input'.")
  group = config.group_size
  if group is not None and group != "row":
    _group_size(group)
  if (config.aggregate is not None) != bool(fact(config.combine, "stacks")):
    raise ValueError(
      f"combine={config.combine!r} with aggregate={config.aggregate!r}: an aggregation "
      "needs combine=use(combine.stack), and nothing else does."
    )
  if config.shared is None and config.join.name != "add":
    raise ValueError(
      f"join={config.join!r} without a shared expert joins nothing; give "
      "shared=use(experts.glu, d_ff=...), or leave join out."
    )
  dense = bool(fact(config.router, "dense"))
  for use, field in ((config.gate, "gate"), (config.dispatch, "dispatch")):
    if bool(fact(use, "dense")) != dense:
      raise ValueError(
        f"{field}={use.name} with router={name}: gates.slots, routers.soft and "
        "dispatch.mix go together, and with no others."
      )
  if dense:
    for field in _NOT_SOFT:
      if getattr(config, field):
        raise ValueError(
          f"{field}={getattr(config, field)!r} with router={name}: Soft MoE has none; "
          f"use {field}={'()' if field in _MANY else 'None'}."
        )
    if config.scale == "input":
      raise ValueError(f"scale='input' with router={name}; use 'output'.")
    return
  _limits(config, name, dispatch)
  _unread(config, name)
  _restrictions(config)
  own = config.k is None
  for loss in config.losses:
    if own and not fact(loss, "any_router"):
      raise ValueError(
        f"losses: {loss.name} does not fit router={name}, which balances itself; "
        "use losses=() or router_z."
      )
    remedy = fact(loss, "fits", lambda config, **_: None)(config, **loss.kwargs)
    if remedy:
      raise ValueError(f"losses: {loss.name} does not fit: {remedy}")
  if own and config.balance is not None:
    raise ValueError(f"balance with router={name}, which balances itself; use None.")
  if config.losses and fact(config.gate, "constant"):
    raise ValueError(
      f"losses={shown(config.losses)} with gate={config.gate.name}, whose logits are "
      "constant: nothing learns from them; use losses=()."
    )
  names = [loss_name(loss) for loss in config.losses]
  if len(set(names)) != len(names):
    twice = next(n for n in names if names.count(n) > 1)
    raise ValueError(
      f"losses={config.losses!r}: two are named {twice!r}; leave one out."
    )


def in_turn(restrict: tuple[Use, ...]) -> list[tuple[int, Use]]:
  """Restrictions with their places, in the order in which the layer asks them."""
  return sorted(enumerate(restrict), key=lambda placed: bool(fact(placed[1], "within")))


def _restrictions(config: Any) -> None:
  """Raises if the restrictions together leave a token too few experts.

  A domain is the token's own: one of them must do, and who is in another is counted as
  dropped.  Which groups of experts are best is anyone's guess: each choice must do.
  """
  if len(config.restrict) < 2:
    return  # each has checked itself
  E, needed = config.num_experts, config.k or 1
  given, guessed = [frozenset(range(E))], []
  for _, use in in_turn(config.restrict):
    leaves = fact(use, "leaves")
    if leaves is None:
      continue  # it does not say; it can only allow less
    if fact(use, "within"):
      guessed.append((leaves, use.kwargs))
    else:
      given = [left for one in given for left in leaves(one, E, **use.kwargs)]

  def fewest(allowed: frozenset[int]) -> int:
    left = {allowed}
    for leaves, kwargs in guessed:
      left = {after for one in left for after in leaves(one, E, **kwargs)}
    return min(map(len, left))

  most = max(map(fewest, given))
  if most < needed:
    raise ValueError(
      f"restrict={shown(config.restrict)}: together they leave a token {most} experts, "
      f"fewer than the {needed} it needs; allow more, or leave one out."
    )


def _group_size(value: Any) -> None:
  if not _whole(value):
    raise ValueError(
      f"group_size={shown(value)} must be a whole number of at least 1, 'row' or None."
    )


def _unread(config: Any, name: str) -> None:
  """Raises on a stage whose result the router does not read."""
  reads = fact(config.router, "reads", ("scores", "select"))
  ignored = {
    "select": (("balance", None), ("select_noise", None)),
    "scores": (("logit_noise", None), ("score", "softmax")),
  }
  for what, fields in ignored.items():
    for field, plain in fields if what not in reads else ():
      value = getattr(config, field)
      if value is not None and value.name != plain:
        instead = "None" if plain is None else f"use(score.{plain})"
        raise ValueError(
          f"{field}={value!r} has no effect with router={name}; use "
          f"{field}={instead}, or another router (routers.top_k)."
        )


def _limits(config: Any, name: str, dispatch: str) -> None:
  """What capacity, its absence and a bounded buffer allow."""
  own = config.k is None  # the choice is the capacity
  dropless = fact(config.dispatch, "dropless")
  if own and config.capacity is not None:
    raise ValueError(
      f"capacity={config.capacity!r} with router={name}: its choice is the capacity; "
      "set capacity_factor there and capacity=None."
    )
  if dropless and own:
    raise ValueError(
      f"router={name} with dropless dispatch={dispatch}; use dispatch.buckets."
    )
  if dropless and config.capacity is not None:
    raise ValueError(
      f"capacity={config.capacity!r} with dropless dispatch={dispatch}; use "
      "dispatch.buckets, or capacity=None to drop nothing."
    )
  if dropless is False and config.capacity is None and not own:
    raise ValueError(
      f"dispatch={dispatch} needs a capacity; give capacity=use(capacity.by_factor, "
      "factor=1.25), or use dispatch.sort (dropless)."
    )
  if config.max_rows is None:
    return
  if not dropless:
    raise ValueError(
      f"max_rows={shown(config.max_rows)} bounds a dropless buffer, but "
      f"dispatch={dispatch} has a capacity; use max_rows=None."
    )
  finite_positive("max_rows", config.max_rows, ", a share of all assignments")
  if config.max_rows > 1:
    raise ValueError(
      f"max_rows={config.max_rows} is a share of all assignments; use 0 to 1."
    )
