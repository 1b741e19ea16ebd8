"""`use(function, **kwargs)`: a call as data, the only thing configurations hold.

Equal by value, hashable (so an equal configuration traces once), printable as the call
it is, and JSON both ways by qualified name.  A misspelt keyword, a positional argument
or a value that cannot be compared fails at once, before anything is traced.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

_F = TypeVar("_F", bound=Callable[..., Any])
_READABLE = ("jmoe", "jax.nn")  # modules that JSON may name without being allowed


def nearest(name: str, known: Iterable[str]) -> str:
  """The tail of an error message: ', did you mean X?', or all that is known."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  if close:
    return f"did you mean {close[0]!r}?"
  return f"known: {', '.join(known)}." if known else "none is taken."


def shown(value: Any, most: int = 80) -> str:
  """A value on one line of an error message, however it prints."""
  text = " ".join(repr(value).split())
  return text if len(text) <= most else text[: most - 3] + "..."


def fact(use: "Use", name: str, default: Any = None) -> Any:
  """A fact that `marked` attached to the function."""
  return getattr(use.function, name, default)


def marked(**facts: Any) -> Callable[[_F], _F]:
  """Decorator: facts about a stage function that the layer and its checks read.

  Facts in use (each optional):
    init: `(key, *, d_model, num_experts, dtype, ...) -> dict`, makes the parameters
      that the function takes first; `use` binds keywords to either of the two.
    check: `(config, **keywords)`, raises on values that cannot work.
    needs: names of `Context` fields without which it cannot run.
    needs_in_training: names of further fields, without which it cannot train.
    ahead: whether it looks at later tokens outside training too, from its keywords.
    random: `(train, **keywords) -> bool`, whether a call draws random numbers.
    choices: `(num_experts, **keywords) -> int | None`, a router's K.
    causal: False if a token's outcome depends on later tokens.
    reads: of a router: what its choice and weights depend on beside the logits, of
      "scores" and "select"; both if it does not say.
    fixed: of a router: True if its weights do not depend on the gate.
    runs: of a router: `(**keywords) -> int`, choices that run in training, at most.
    takes_best: of a router: True if it chooses the k highest of what it selects by.
    weighs: of experts: True if they multiply their outputs by `Rows.weight`, whenever
      there is one; a function that adds to their outputs must not have it.
    sums: of experts that weigh: True if they give `[T,D]`, the sums of each token's
      rows, whenever `Rows.sums` says so.
    buffers: of experts: True if they take a tuple of `Rows` as well, and then give one.
    constant: of a gate: True if every token gets the same logits.
    after_step: of a gate: `(expert parameters, buffers, **keywords) -> buffers`, those
      that it has after an optimizer step.
    within: of a restriction: True if it ranks experts, so it is asked after the others
      and given their mask.
    same_in_layers: of a restriction: `(**keywords) -> bool`, whether its key is the
      same in all layers.
    leaves: of a restriction: `(allowed, num_experts, **keywords) -> sets of experts`,
      what it may leave a token of those that others allow.
    cut: of a restriction: `(use, num_experts, kept) -> Use | None`, what it is where
      only the experts `kept` are left; None: it allows all of them.
    resized: of a restriction that numbers no experts: `(use, num_experts, k_before, k)
      -> Use`, what it is of so many experts, of which a token takes k.
    ignores: `(**keywords) -> names` of optional arguments that it takes and reads not.
    gated: of experts' hidden function: True if it is `activation(first) * second`.
    dropless: of a dispatch: True, False, or None where it takes either.
    exchanges: of a dispatch: True if it carries rows over mesh axes to experts on other
      devices; then it takes `axis`, those axes, and `placement`.
    in_place: of a dispatch: True if it moves no rows and runs all hidden units.
    gspmd: of a dispatch: True if XLA splits it over a mesh, outside `shard_map`.
    levels: of a priority: `(routing) -> int`, if it gives whole numbers, all of them
      from `1 - levels` to 0: queues are then sorted by one key.
    skips: of an aggregation: `(**keywords) -> bool`, whether it adds `residual`, the
      block's skip connection, itself; the block then must not.
    macs: of an aggregation: `(k, d_model, **keywords) -> int`, multiplications of
      matrix products for a token; each weight once if it does not say.
    fits: of a loss: `(config, **keywords) -> str | None`, a remedy if it does not fit.
  """

  def attach(function: _F) -> _F:
    for name, fact in facts.items():
      setattr(function, name, fact)
    return function

  return attach


@functools.cache
def _keywords(function: Callable[..., Any]) -> Mapping[str, bool]:
  """Keyword-only parameters of a function, and whether each is required."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # a builtin without a signature takes no keywords
    return {}
  kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return {
    p.name: p.kind is kinds[0] and p.default is inspect.Parameter.empty
    for p in signature.parameters.values()
    if p.kind is kinds[0] or (p.kind is kinds[1] and p.default is not p.empty)
  }


# What the layer itself passes to every stage: never part of a configuration.
PASSED = frozenset(
  "mask context key train forced previous_logits axes rows plan x_TD d_model".split()
  + "num_experts dtype table routing axis placement before".split()
)


@dataclasses.dataclass(frozen=True, repr=False)
class Use:
  """A function and the keywords it will be called with.  Make one with `use`."""

  function: Callable[..., Any]
  keywords: tuple[tuple[str, Any], ...] = ()

  @property
  def kwargs(self) -> dict[str, Any]:
    return dict(self.keywords)

  @property
  def name(self) -> str:
    return self.function.__name__

  def __call__(self, *args: Any, **passed: Any) -> Any:
    return _call(self.function, self.kwargs, args, passed)

  def init(self, *args: Any, **passed: Any) -> dict[str, Any]:
    """The parameters of the function; an empty dict if it has none."""
    init = getattr(self.function, "init", None)
    return {} if init is None else _call(init, self.kwargs, args, passed)

  def get(self, keyword: str) -> Any:
    """The value a keyword will have: as given, or the function's default."""
    if keyword in self.kwargs:
      return self.kwargs[keyword]
    return inspect.signature(self.function).parameters[keyword].default

  def replace(self, **kwargs: Any) -> "Use":
    return use(self.function, **{**self.kwargs, **kwargs})

  def __deepcopy__(self, memo: dict) -> "Use":
    return self  # a value; and copies of jitted functions would not be equal

  def __repr__(self) -> str:
    inside = ", ".join(f"{k}={_show(v)}" for k, v in self.keywords)
    return f"{self.name}({inside})"


def use(function: Callable[..., Any], /, *positional: Any, **kwargs: Any) -> Use:
  """A call as data.

  >>> from jmoe import routers, use
  >>> use(routers.top_k, k=2)
  top_k(k=2)
  >>> use(routers.top_k, k=2) == use(routers.top_k, k=2)
  True

  Args:
    function: a public function of a module.
    **kwargs: its keywords; hashable values, other `use` values among them.  NumPy
      scalars become Python's.

  Raises:
    TypeError: the function does not take a keyword, a required one is missing, or a
      value is given by position or cannot be hashed.
    ValueError: a value is NaN, which equals nothing.
  """
  if not callable(function):
    raise TypeError(
      f"use: {shown(function)} is not a function; pass the function itself."
    )
  init = getattr(function, "init", None)
  known = dict(_keywords(function)) | (dict(_keywords(init)) if init else {})
  settable = {k for k in known if k not in PASSED}
  name = getattr(function, "__name__", shown(function))
  if positional:
    raise TypeError(
      f"use({name}): {shown(positional[0])} is given by position; name it, one of: "
      f"{', '.join(sorted(settable))}."
    )
  for keyword, value in kwargs.items():
    if keyword not in settable:
      raise TypeError(
        f"use({name}): unknown keyword {keyword!r}; {nearest(keyword, settable)}"
      )
    if isinstance(value, np.generic):
      kwargs[keyword] = value = value.item()
    try:
      hash(value)
    except TypeError:
      raise TypeError(
        f"use({name}): {keyword}={shown(value)} cannot be compared by value; "
        "use numbers, strings, functions, tuples or use(...)."
      ) from None
    if value != value or isinstance(value, tuple) and any(v != v for v in value):
      raise ValueError(f"use({name}): {keyword}={value!r}; give a number, not NaN.")
  missing = sorted(k for k in settable if known[k] and k not in kwargs)
  if missing:
    raise TypeError(f"use({name}): missing {', '.join(missing)}; give {missing[0]}=...")
  return Use(function, tuple(sorted(kwargs.items())))


def _call(function, kwargs, args, passed):
  taken = _keywords(function)
  both = {**kwargs, **passed}
  return function(*args, **{k: v for k, v in both.items() if k in taken})


def _show(value: Any) -> str:
  if isinstance(value, Use) or not callable(value):
    return repr(value)
  return getattr(value, "__name__", repr(value))


# -- JSON ------------------------------------------------------------------------------


def qualified_name(function: Callable[..., Any]) -> str:
  """Where a reader of JSON finds this function again.

  Raises:
    ValueError: it cannot be found by name (a lambda, a local function).
  """
  name = getattr(function, "__name__", "")
  if getattr(jax.nn, name, None) is function:
    return f"jax.nn.{name}"
  module = getattr(function, "__module__", None)
  found = importlib.import_module(module) if module else None
  if found is None or getattr(found, name, None) is not function:
    raise ValueError(
      f"{function!r} has no public name; move it to the top level of a module."
    )
  return f"{module}.{name}"


def to_jsonable(value: Any) -> Any:
  """A configuration as plain lists, dicts, numbers and strings."""
  if isinstance(value, Use):
    call = {k: to_jsonable(v) for k, v in value.keywords}
    return {"use": qualified_name(value.function), **call}
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {
      "type": f"{type(value).__module__}.{type(value).__qualname__}",
      **{k: to_jsonable(v) for k, v in fields.items()},
    }
  if isinstance(value, tuple):
    return [to_jsonable(v) for v in value]
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if callable(value):
    return {"function": qualified_name(value)}
  raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form.")


def from_jsonable(value: Any, *, allow: tuple[str, ...] = ()) -> Any:
  """The inverse of `to_jsonable`.

  Args:
    value: what `json.loads` gave.
    allow: module prefixes, beside `jmoe` and `jax.nn`, that names may come from.

  Raises:
    ValueError: a name outside the allowed modules, or one that does not exist.
  """
  again = functools.partial(from_jsonable, allow=allow)
  if isinstance(value, list):
    return tuple(again(v) for v in value)
  if not isinstance(value, dict):
    return value
  rest = {k: again(v) for k, v in value.items() if k not in ("use", "type", "function")}
  if "use" in value:
    return use(_find(value["use"], allow), **rest)
  if "function" in value:
    return _find(value["function"], allow)
  if "type" not in value:
    raise ValueError(f"{value!r} names neither 'use', 'function' nor 'type'.")
  cls = _find(value["type"], allow)
  if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
    raise ValueError(f"JSON names type {value['type']!r}, which is no configuration.")
  known = [f.name for f in dataclasses.fields(cls)]
  for key in rest:
    if key not in known:
      raise ValueError(
        f"{cls.__name__}: unknown key {key!r} in JSON; {nearest(key, known)}"
      )
  for field in dataclasses.fields(cls):
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and field.name not in rest:
      raise ValueError(f"{cls.__name__}: {field.name} is missing in JSON; add it.")
  return cls(**rest)


def to_json(config: Any) -> str:
  """A configuration as indented JSON text."""
  return json.dumps(to_jsonable(config), indent=2)


def from_json(text: str, *, allow: tuple[str, ...] = ()) -> Any:
  """The configuration that `to_json` wrote; names only from allowed modules."""
  try:
    value = json.loads(text)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"from_json: {shown(text)} is no JSON: {error}; see to_json."
    ) from None
  if not isinstance(value, dict):
    raise ValueError(f"from_json: {shown(text)} is no configuration; see to_json.")
  return from_jsonable(value, allow=allow)


def _find(name: str, allow: tuple[str, ...]) -> Any:
  prefixes = _READABLE + tuple(allow)
  if not isinstance(name, str):
    raise ValueError(f"JSON names {shown(name)}, which is not a string.")
  if not any(name.startswith(p + ".") for p in prefixes):
    raise ValueError(
      f"JSON names {name!r}, outside {', '.join(prefixes)}; pass allow=(module,)."
    )
  module, _, attribute = name.rpartition(".")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError):
    raise ValueError(f"JSON names {name!r}, which does not exist.") from None
  if isinstance(found, types.ModuleType) or not callable(found):
    raise ValueError(f"JSON names {name!r}, which is not a function or a type.")
  return found
