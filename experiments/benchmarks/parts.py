"""Which part of a layer an operation of a compiled program belongs to.

By the names that the layer gives its parts (`jax.named_scope`), which XLA carries along
in `op_name`, also into gradients: `jit(step)/transpose(jvp(jit(_moe)))/route/mul`.
"""
# SPDX-License-Identifier: Apache-2.0

import collections
import re

# Scope -> part; the innermost scope counts.
SCOPES = {
  "gate": "gate",
  "route": "front",
  "assign": "front",
  "layout": "front",
  "carry": "rows",
  "rows": "rows",
  "experts": "experts",
  "aggregate": "messages",
  "report": "losses",
}
PARTS = ("gate", "front", "rows", "experts", "losses", "other")
ALL = (*PARTS[:4], "messages", *PARTS[4:])  # a layer with an `aggregate` has one more
ROUTING = ("gate", "front", "rows", "losses")  # what a dense layer has not
# Instructions for which nothing is launched.
_FREE = (
  "parameter",
  "constant",
  "bitcast",
  "tuple",
  "get-tuple-element",
  "opt-barrier",
  "after-all",
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(")


def part(op_name: str) -> str | None:
  """Of the innermost scope in a name; None if there is none."""
  for piece in reversed(op_name.split("/")):
    for word in reversed(re.findall(r"\w+", piece)):
      if word in SCOPES:
        return SCOPES[word]
  return None


def parts_of(text: str) -> dict[str, str]:
  """Operation -> part, of all operations of a compiled program.

  A fusion is what its own name says, which is its result's; one without a scope is what
  most operations inside it are.

  Args:
    text: from `compiled.as_text()`.
  """
  found: dict[str, str | None] = {}
  inside: dict[str, collections.Counter[str]] = collections.defaultdict(
    collections.Counter
  )
  calls: dict[str, str] = {}
  computation = ""
  for line in text.split("\n"):
    if head := _HEAD.match(line):
      computation = head[2]
    elif made := _LINE.match(line):
      named = re.search(r'op_name="([^"]*)"', line)
      mine = part(named[1]) if named else None
      found[made[1]] = mine
      if mine:
        inside[computation][mine] += 1
      if called := re.search(r"calls=%?([\w.-]+)", line):
        calls[made[1]] = called[1]
  for name, called in calls.items():
    if found[name] is None and inside[called]:
      found[name] = inside[called].most_common(1)[0][0]
  return {name: mine or "other" for name, mine in found.items()}


def operations(text: str) -> list[str]:
  """What a program launches, in its order: kernels, copies, calls of libraries.

  A loop counts once, and a library may launch several kernels in one call.

  Args:
    text: from `compiled.as_text()`.
  """
  entry = False
  found = []
  for line in text.split("\n"):
    if head := _HEAD.match(line):
      entry = head[1] is not None
    elif entry and (made := _LINE.match(line)) and made[2] not in _FREE:
      found.append(made[1])
  return found
