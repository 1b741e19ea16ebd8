"""Where a compiled function's time goes, by operation, as the profiler saw it."""
# SPDX-License-Identifier: Apache-2.0

import collections
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CALLS = 3


def prepare() -> None:
  """Turns off command buffers, which hide operations; before jax makes a backend."""
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="


def shown(
  compiled: Any, operands: Sequence[Any], most: int, *, kept: int | None = None
) -> list[list[Any]]:
  """Prints and returns the operations that took longest of a call.

  Args:
    compiled: a function from `jit(...).lower(...).compile()`.
    operands: of the function.
    most: rows to list.
    kept: which operand the first result replaces in the next call, where the function
      takes it away; None: all calls have the same operands.

  Returns:
    [ms a call, times a call, operation, place in the program] each.
  """
  rows = _table(compiled, list(operands), kept)
  total = sum(row[0] for row in rows)
  print(f"  traced: {total:.2f} ms of operations")
  for ms, count, name, where in rows[:most]:
    print(
      f"  {ms:8.3f} ms {ms / max(total, 1e-9):6.1%} {count:5.0f} x {name:<34}{where}"
    )
  return rows[:most]


def spent(run: Callable[[], Any]) -> float:
  """Milliseconds of all operations on the device while `run` queues them."""
  return sum(ms for _, ms in _operations(run))


def _operations(run: Callable[[], Any]) -> list[tuple[str, float]]:
  """(operation, milliseconds) on the device; waits for what `run` returns."""
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run())
    (path,) = Path(folder).rglob("*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(path))
  return [
    (str(dict(event.stats).get("hlo_op", event.name)), event.duration_ns / 1e6)
    for plane in found.planes
    if plane.name.startswith("/device:")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]


def measured(
  compiled: Any, operands: Sequence[Any], *, kept: int | None = None
) -> dict[str, tuple[float, float]]:
  """Operation of the program -> (milliseconds a call, launches a call).

  Args:
    compiled, operands, kept: as of `shown`.
  """
  operands = list(operands)

  def run():
    for _ in range(_CALLS):
      out = compiled(*operands)
      if kept is not None:
        operands[kept] = out[0]
    return out

  spent: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for name, ms in _operations(run):
    spent[name][0] += ms / _CALLS
    spent[name][1] += 1 / _CALLS
  return {name: (ms, count) for name, (ms, count) in spent.items()}


def _table(compiled: Any, operands: list[Any], kept: int | None) -> list[list[Any]]:
  text = compiled.as_text()
  places = dict(re.findall(r"%?([\w.-]+) = [^\n]*?op_name=\"([^\"]*)\"", text))
  found = measured(compiled, operands, kept=kept)
  return merged(
    [
      [ms, count, name[:33], "/".join(places.get(name, "").split("/")[-4:])[-80:]]
      for name, (ms, count) in found.items()
    ]
  )


def merged(rows: list[list[Any]]) -> list[list[Any]]:
  """One row for all operations of a kind and place, as layers have them; slowest first.

  Args:
    rows: [ms, times, operation, place] each; operations of a kind differ in a number
      behind their name.
  """
  sums: dict[tuple[str, str], list[float]] = {}
  for ms, count, name, where in rows:
    total = sums.setdefault((re.sub(r"[.\d]+$", "", name), where), [0.0, 0.0])
    total[0] += ms
    total[1] += count
  found = [[ms, count, *key] for key, (ms, count) in sums.items()]
  return sorted(found, reverse=True)
