"""Misspelt keywords of functions and of values, answered with the nearest known one."""
# SPDX-License-Identifier: Apache-2.0

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from jmoe.use import nearest

_C = TypeVar("_C", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])


def known(where: str, names: Iterable[str], among: Iterable[str]) -> None:
  """Raises a TypeError for the first name that is not among those known."""
  among = tuple(among)
  for name in names:
    if name not in among:
      raise TypeError(f"{where}: unknown keyword {name!r}; {nearest(name, among)}")


def spelt_fields(cls: _C) -> _C:
  """Decorator of a dataclass: an unknown keyword is answered with the nearest one."""
  init = cls.__init__
  fields = tuple(inspect.signature(cls).parameters)

  @functools.wraps(init)
  def checked(self, *args: Any, **keywords: Any) -> None:
    known(cls.__name__, keywords, fields)
    init(self, *args, **keywords)

  cls.__init__ = checked
  return cls


def spelt(function: _F) -> _F:
  """Decorator: a call that does not fit the signature is refused in one line.

  For functions that are called while a run is set up, not while it computes.
  """
  signature = inspect.signature(function)
  module = function.__module__.rpartition(".")[2]
  where = f"{module}.{function.__name__}"

  @functools.wraps(function)
  def checked(*args: Any, **keywords: Any) -> Any:
    known(where, keywords, signature.parameters)
    try:
      signature.bind(*args, **keywords)
    except TypeError as error:
      listed = ", ".join(signature.parameters)
      raise TypeError(f"{where}: {error}; its keywords: {listed}.") from None
    return function(*args, **keywords)

  return checked  # type: ignore[return-value]
