"""Bad input: said in one line, before anything is traced or compiled.

Every message names the argument, its value and the remedy.  Here: whether the fields of
a configuration are known, and of their kinds; together: `_together_checks`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import _spelling as spelling, _value_checks
from jmoe._call_checks import (
  activations as activations,
  call as call,
  flag as flag,
  layer_of as layer_of,
  owns_skip as owns_skip,
  params as params,
  random_key as random_key,
)
from jmoe._mesh_checks import over_mesh as over_mesh
from jmoe._model_checks import model_config as model_config
from jmoe._together_checks import in_turn as in_turn, together
from jmoe._value_checks import finite_positive as finite_positive, positive as positive
from jmoe.parallel.rules import Rules
from jmoe.use import Use, fact as fact, shown

_ONE = ("gate", "score", "router", "priority", "renormalise", "dispatch", "experts")
_ONE += ("combine", "join")
_MAYBE = ("input_noise", "logit_noise", "select_noise", "capacity", "aggregate")
_MAYBE += ("shared", "balance")
_MANY = ("restrict", "losses")
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
  spelling.known(where or (also or cls).__name__, names, known)


def named(cls: _C) -> _C:
  """Class decorator: an unknown keyword is answered with the nearest known one.

  NumPy scalars become Python's, so that equal values are equal in JSON too.
  """
  init = spelling.spelt_fields(cls).__init__

  @functools.wraps(init)
  def checked(self, *args: Any, **keywords: Any) -> None:
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
  if config.sharding is not None and not isinstance(config.sharding, Rules):
    raise TypeError(
      f"sharding={shown(config.sharding)} is no table; use jmoe.parallel.Rules(...), "
      "or one of jmoe.parallel.TABLES."
    )
  if not isinstance(config.rescore, bool):
    raise ValueError(f"rescore={shown(config.rescore)} must be True or False.")
  _dtype(config.param_dtype)
  _own_check(config, config.router)  # others ask it for k
  for _, use in stages:
    _own_check(config, use)
  together(config)


def _tuple(value: Any) -> tuple[Use, ...]:
  return () if value is None else value if isinstance(value, tuple) else (value,)


def _own_check(config: Any, use: Use) -> None:
  if fact(use, "check"):
    fact(use, "check")(config, **use.kwargs)
  for value in use.kwargs.values():
    if isinstance(value, Use):
      _own_check(config, value)


def _dtype(value: Any) -> None:
  _value_checks.float_type("param_dtype", value)
  if jnp.dtype(value) != jax.dtypes.canonicalize_dtype(value):
    raise ValueError(
      f"param_dtype={shown(value)} needs jax.config.update('jax_enable_x64', True); "
      "without it parameters would be float32, so use 'float32'."
    )
