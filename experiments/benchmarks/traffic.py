"""Bytes that a compiled program moves beside its grouped products, by operation.

The compiler's own figure takes a gather to read the whole array that it picks from.
Here every operation of the entry computation reads its operands and writes its results
once, a gather reads as much as it writes, and what lies in on-chip memory is free.
"""
# SPDX-License-Identifier: Apache-2.0

import math
import re

_SIZES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",  # bodies are searches of a few kilobytes
  "iota",
)


def moved(text: str, counted: set[str]) -> float:
  """Bytes of all operations but some.

  Args:
    text: a compiled program, an operation on a line.
    counted: names of operations to leave out.
  """
  entry = text[text.index("\nENTRY") :]
  gathers = _gathering(text)
  sizes: dict[str, int] = {}
  started: dict[str, list[int]] = {}
  total = 0.0
  pattern = r"%([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^\n]*?)\)([^\n]*)"
  for name, made, kind, given, rest in re.findall(pattern, entry):
    sizes[name] = result = _bytes(made)
    operands = [sizes.get(n, 0) for n in re.findall(r"%([\w.-]+)", given)]
    if kind in ("call-start", "call-update", "async-start", "async-update"):
      # On another core: counted when it is done, by what it was given.
      before = [started.get(n, []) for n in re.findall(r"%([\w.-]+)", given)]
      started[name] = [n for n in operands + sum(before, []) if n]
      sizes[name] = 0
      continue
    if kind in ("call-done", "async-done"):
      (first,) = re.findall(r"%([\w.-]+)", given)
      operands = started.get(first, [])
      if "gather" in name:
        operands = [min(size, result) for size in operands]
      total += result + sum(operands)
      continue
    if kind in _FREE or kind.endswith("-done") or name in counted:
      continue
    if kind.endswith("-start"):  # to or from on-chip memory: what arrives is moved
      total += _on_chip(made) or result
      continue
    called = re.search(r"calls=%([\w.-]+)", rest)
    if kind == "gather" or (called and called[1] in gathers):
      operands = [min(size, result) for size in operands]
    total += result + sum(operands)
  return total


def _gathering(text: str) -> set[str]:
  """Names of computations that gather."""
  found = re.findall(r"\n%([\w.-]+) \([^\n]*\{\n(.*?)\n\}", text, re.DOTALL)
  return {name for name, body in found if re.search(r" gather\(", body)}


def _arrays(made: str) -> list[tuple[int, bool]]:
  """Bytes of each array, and whether it lies in on-chip memory."""
  found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", made)
  return [
    (
      math.prod(int(n) for n in sizes.split(",") if n) * _SIZES.get(dtype, 4),
      "S(" in layout,
    )
    for dtype, sizes, layout in found
  ]


def _bytes(made: str) -> int:
  return sum(size for size, on_chip in _arrays(made) if not on_chip)


def _on_chip(made: str) -> int:
  return sum(size for size, on_chip in _arrays(made) if on_chip)
