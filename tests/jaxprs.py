"""Reading programs: every equation of a jaxpr, every product of a lowered text."""
# SPDX-License-Identifier: Apache-2.0

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core


def equations(jaxpr: Any) -> Iterator[core.JaxprEqn]:
  """The equations of a jaxpr and, whatever holds them, of all jaxprs inside."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
          yield from equations(inner)


def primitives(jaxpr: Any) -> set[str]:
  return {eqn.primitive.name for eqn in equations(jaxpr)}


def scatters(jaxpr: Any) -> list[str]:
  """Equations that scatter; a `dynamic_update_slice` is none."""
  found = [e for e in equations(jaxpr) if e.primitive.name.startswith("scatter")]
  return [f"{e.primitive.name} into {e.outvars[0].aval}" for e in found]


def arrays(jaxpr: Any) -> Iterator[Any]:
  """Shape and dtype of everything that some equation makes."""
  for eqn in equations(jaxpr):
    for variable in eqn.outvars:
      if hasattr(variable.aval, "shape"):
        yield variable.aval


class Product(NamedTuple):
  """A `dot_general` or `ragged_dot` of a lowered program."""

  left: tuple[int, ...]
  right: tuple[int, ...]
  out: tuple[int, ...]
  dtypes: tuple[str, str]  # of the operands
  precision: tuple[str, str]


_PRODUCT = re.compile(
  r": \(tensor<([^>]*)>, tensor<([^>]*)>(?:, tensor<[^>]*>)?\) -> tensor<([^>]*)>"
)
_PRECISION = re.compile(r"(?:precision = \[|#chlo<precision )(\w+).*?(\w+)[>\]]")


def products(text: str) -> list[Product]:
  """Every matrix product of a lowered program, as StableHLO text."""
  found = []
  for line in text.splitlines():
    if "stablehlo.dot_general" not in line and "chlo.ragged_dot" not in line:
      continue
    match = _PRODUCT.search(line)
    assert match, line
    types = [part.split("x") for part in match.groups()]
    shapes = [tuple(int(n) for n in one[:-1]) for one in types]
    said = _PRECISION.search(line)
    precision = said.groups() if said else ("DEFAULT", "DEFAULT")
    found.append(Product(*shapes, (types[0][-1], types[1][-1]), precision))
  return found
