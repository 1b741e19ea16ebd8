"""What a compiled program multiplies and sends, loops counted as often as they run.

XLA's own cost analysis takes a loop's body once, and believes what a kernel says of
itself.  Here the text of the program is read: products by their shapes, collectives by
the bytes that leave a device, each times the trips of the loops around it.
"""
# SPDX-License-Identifier: Apache-2.0

import math
import re
from typing import Any, NamedTuple

from experiments.benchmarks import grids

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{$(.*?)^\}", re.M | re.S)


class Counted(NamedTuple):
  """Of one device, in one run of the program."""

  flops: float
  collectives: dict[str, tuple[float, float]]  # name -> (calls, bytes that leave)


def count(text: str, sizes_E: Any) -> Counted:
  """Counts a program.

  Args:
    text: of `compiled.as_text()`.
    sizes_E: rows of each expert, for grouped matmuls whose grids are data.
  """
  text = grids.lines(text)
  bodies: dict[str, str] = dict(_COMPUTATION.findall(text))
  entry = re.search(r"^ENTRY %([\w.-]+) ", text, re.M)
  assert entry is not None, "no entry computation"
  times = _times(bodies, entry[1])
  kernels = {kernel.name: kernel for kernel in grids.kernels(text)}
  flops, sent = 0.0, {}
  for name, body in bodies.items():
    if not times.get(name):
      continue
    flops += times[name] * _products(body)
    for kernel in kernels.values():
      if f"%{kernel.name} = " in body:
        flops += times[name] * kernel.flops(sizes_E)
  seen = set()
  for name, body in bodies.items():
    for kind, mark, size in _collectives(body):
      # Steps of one collective among other work are clones that share a mark.
      if not times.get(name) or (mark is not None and mark in seen):
        continue
      seen.add(mark)
      calls, total = sent.get(kind, (0.0, 0.0))
      sent[kind] = calls + times[name], total + times[name] * size
  return Counted(flops, sent)


def _times(bodies: dict[str, str], entry: str) -> dict[str, float]:
  """How often each computation runs, over all the places that call it."""
  times = dict.fromkeys(bodies, 0.0)
  pending = [entry]
  calls: dict[str, list[tuple[str, float]]] = {}
  while pending:
    name = pending.pop()
    if name in calls:
      continue
    calls[name] = _called(bodies[name], bodies)
    pending += [other for other, _ in calls[name]]
  # A computation is defined before it is called: callers come last in the text.
  times[entry] = 1.0
  for name in reversed(list(bodies)):
    for other, trips in calls.get(name, []):
      times[other] += times[name] * trips
  return times


def _called(body: str, bodies: dict[str, str]) -> list[tuple[str, float]]:
  found = []
  for line in body.splitlines():
    loop = re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", line)
    if loop:
      found.append((loop[2], _trips(bodies[loop[1]])))
      continue
    for names in re.findall(r"(?:calls|called_computations)=\{?(%[\w.,% -]+)", line):
      found += [(n, 1.0) for n in re.findall(r"%([\w.-]+)", names) if n in bodies]
    branches = re.search(r"branch_computations=\{([^}]*)\}", line)
    if branches:  # one of them runs: the last, which is the usual one
      found.append((re.findall(r"%([\w.-]+)", branches[1])[-1], 1.0))
  return found


def _trips(condition: str) -> float:
  """Of a loop that counts from zero; 1 where its end is data."""
  ends = re.findall(r"= s32\[\][^=]*? constant\((\d+)\)", condition)
  return float(ends[0]) if len(ends) == 1 else 1.0


def _products(body: str) -> float:
  """FLOPs of dots and convolutions: two for each result and contracted entry."""
  shapes = grids._shapes(body)
  total = 0.0
  pattern = r"%([\w.-]+) = [^\n]*? (?:dot|convolution)\(([^\n]*?)\)([^\n]*)"
  for name, given, rest in re.findall(pattern, body):
    left = re.findall(r"%([\w.-]+)", given)[0]
    labels = re.search(r"dim_labels=(\w+)_", rest)
    if labels:
      depth = shapes[left][1][labels[1].index("f")]
    else:
      dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
      assert dims is not None, rest
      depth = math.prod(shapes[left][1][int(n)] for n in dims[1].split(",") if n)
    total += 2.0 * math.prod(shapes[name][1]) * depth
  return total


def _collectives(body: str) -> list[tuple[str, str | None, float]]:
  """(kind, mark of its clones, bytes that leave a device) of each collective."""
  found = []
  for line in body.splitlines():
    match = re.search(r"= (\(?.*?) (" + "|".join(_OPS) + r")(?:-start)?\(", line)
    if not match:
      continue
    made, kind = match.groups()
    devices = _group(line)
    size = _bytes(made)
    if "-start(" in line:  # a pair of what goes in and what comes out
      size = max(_each(made), default=0.0)
    part = (devices - 1) / devices
    leaves = {
      "all-gather": size * part,
      "all-reduce": 2 * size * part,
      "reduce-scatter": size * (devices - 1),
    }.get(kind, size * part)
    chain = re.search(r'chain_id="(\d+)"', line)
    found.append((kind.replace("-", "_"), chain and chain[1], leaves))
  return found


def _group(line: str) -> int:
  """Devices that take part together."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  listed = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  if listed:
    return int(listed[1])
  written = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  return len(written[1].split(",")) if written else 1


def _each(made: str) -> list[float]:
  arrays = re.findall(r"(\w+)\[([\d,]*)\]", made)
  return [
    float(math.prod(int(n) for n in sizes.split(",") if n)) * _SIZES.get(dtype, 4)
    for dtype, sizes in arrays
    if not dtype.isdigit() and dtype[0] in "spbfu"
  ]


def _bytes(made: str) -> float:
  return sum(_each(re.sub(r"\{[^}]*\}", "", made)))
