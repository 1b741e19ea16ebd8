"""How a command line changes a run: dotted paths and Python literals, no evaluation."""
# SPDX-License-Identifier: Apache-2.0

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.config import Run
from jmoe.use import Use, nearest, shown


def with_settings(run: Run, settings: Sequence[str]) -> Run:
  """A run with some values replaced.

  Args:
    run: where to start.
    settings: "dotted.path=value" each; a path goes through fields, keywords of
      `use(...)` and indices of tuples; a value is a Python literal, or else text.

  Raises:
    ValueError: no such path (with the nearest), or a value of another type.
  """
  return _replaced(run, [_change(setting) for setting in settings])


def values(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
  """(dotted path, value as text) of all parts of a run.

  What is a literal can be given to `with_settings` again; a stage is shown by its
  function, before its keywords.
  """
  children = _children(node)
  function = node.function if isinstance(node, Use) else node
  if callable(function):
    yield path, f"{function.__module__}.{function.__name__}"
  elif not children:
    yield path, repr(node)
  for name, child in children.items():
    yield from values(child, f"{path}.{name}" if path else name)


def _change(setting: str) -> tuple[list[str], Any, str]:
  """(path, value, the setting as it was given)."""
  path, equals, text = setting.partition("=")
  if not equals:
    raise ValueError(f"--set {setting}: write path=value, e.g. --set steps=100.")
  try:
    return path.split("."), ast.literal_eval(text), setting
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return path.split("."), text, setting  # no literal: `{[]: 1}` has a list as a key


def _replaced(
  node: Any, changes: list[tuple[list[str], Any, str]], optional: bool = False
) -> Any:
  """All changes at once: values that fit each other may not fit the old ones."""
  below: dict[str, list[tuple[list[str], Any, str]]] = {}
  for path, value, setting in changes:
    if path:
      below.setdefault(path[0], []).append((path[1:], value, setting))
    else:
      node = _fitting(node, value, setting, optional)
  children, new = _children(node), {}
  for name, some in below.items():
    if name in children:
      new[name] = _replaced(children[name], some, _may_be_none(node, name))
    elif isinstance(node, Use) and not any(path for path, _, _ in some):
      new[name] = some[-1][1]  # a keyword at its default
    else:
      what = nearest(name, children) if children else "it has no parts."
      raise ValueError(f"--set {some[0][2]}: unknown key {name!r}; {what}")
  if not new:
    return node
  if isinstance(node, tuple):
    return tuple(new.get(str(n), child) for n, child in enumerate(node))
  if isinstance(node, Use):
    return node.replace(**new)
  return dataclasses.replace(node, **new)


def _children(node: Any) -> dict[str, Any]:
  if isinstance(node, tuple):
    return {str(n): child for n, child in enumerate(node)}
  if isinstance(node, Use):
    return node.kwargs
  if dataclasses.is_dataclass(node):
    return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
  return {}


def _may_be_none(node: Any, name: str) -> bool:
  """Whether a field says so in its type, or a keyword by its default."""
  if isinstance(node, Use):
    known = inspect.signature(node.function).parameters
    return name in known and known[name].default is None
  if dataclasses.is_dataclass(node):
    hints = typing.get_type_hints(type(node))
    return types.NoneType in typing.get_args(hints[name])
  return False


def _fitting(old: Any, new: Any, setting: str, optional: bool) -> Any:
  """The new value, if it is of the old one's type; an integer may be a float."""
  if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
    return float(new)
  if (new is None and optional) or old is None or type(old) is type(new):
    return new
  raise ValueError(
    f"--set {setting}: {new!r} is a {type(new).__name__}, but the value is a "
    f"{type(old).__name__}, now {shown(old)}."
  )
