"""What every implementation answers, and how all of them are timed in turn."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from experiments.benchmarks.shapes import Shape

KINDS = ("forward", "step")
TURN = 0.1  # seconds that one turn of one row lasts
WRONG = 2e-2  # relative error of bfloat16 that is no rounding


class Timed(Protocol):
  def __call__(self, kind: str, budget: float) -> float:
    """Milliseconds of a call, from as many as fit into `budget` seconds."""
    ...


@dataclasses.dataclass
class Row:
  """One implementation of the layer, compiled.

  Args:
    name: as in the table.
    timed: times it.
    figures: errors against float32, seconds of compilation, GB in use at once.
    traced: kind -> (compiled function, operands), of rows of this process.
  """

  name: str
  timed: Timed
  figures: dict[str, Any] = dataclasses.field(default_factory=dict)
  traced: dict[str, Any] = dataclasses.field(default_factory=dict)
  ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  why: str | None = None  # it has no figures after all

  @property
  def drops(self) -> bool:
    return "capacity" in self.name


@dataclasses.dataclass(frozen=True)
class Missing:
  """An implementation that is not here, and why."""

  name: str
  why: str


def reason(error: BaseException) -> str:
  """An exception in one line that fits into a table."""
  said = " ".join(str(error).split())
  return f"{type(error).__name__}: {said}"[:200]


def span(call: Callable[[], Any], wait: Callable[[Any], Any], budget: float) -> float:
  """Milliseconds of a call: some are queued, and the last one is waited for.

  A slow call is timed once; nothing is timed before a call that is not.
  """
  wait(call())
  begin = time.perf_counter()
  wait(call())
  once = time.perf_counter() - begin
  if once > budget:
    return 1e3 * once
  inner = max(2, round(budget / once))
  begin = time.perf_counter()
  for _ in range(inner):
    last = call()
  wait(last)
  return 1e3 * (time.perf_counter() - begin) / inner


def in_turn(
  rows: list[Row],
  ceiling: Callable[[], float],
  rounds: int,
  turn: float = TURN,
  kinds: Sequence[str] = KINDS,
  until: float = float("inf"),
  after: Callable[[], None] = lambda: None,
) -> list[float]:
  """Milliseconds into the rows; FLOP/s of square products before each of them.

  Everything is measured in turn, a tenth of a second at a time: a chip that has worked
  for long is slower than one that has rested, and so is its ceiling.  The order is
  another one in each round: what follows a slow row finds a cooler chip.  A row that
  fails says why, and the others go on.

  Args:
    rows, ceiling, rounds, turn, kinds: what, how often, and for how many seconds each.
    until: of `time.monotonic`; no round begins later, but the first two.
    after: called after each round that counts.
  """
  ceilings = []
  order = random.Random(0)
  for n in range(rounds + 1):
    if n > 1 and time.monotonic() > until:
      break
    for row in order.sample(rows, len(rows)):
      for kind in kinds:
        if row.why:
          continue
        bound = ceiling()
        try:
          took = row.timed(kind, turn)
        except Exception as error:  # of somebody else's code: any
          row.why = reason(error)
          continue
        if n:  # the first round warms up
          ceilings.append(bound)
          row.ms.setdefault(kind, []).append(took)
    if n:
      after()
  return ceilings


def summed_up(row: Row, shape: Shape, bound: float) -> dict[str, Any]:
  """A row of the result: rates from the medians, and their share of the ceiling."""
  found: dict[str, Any] = {"name": row.name, "drops": row.drops} | row.figures
  for kind in KINDS:
    rate = shape.flops(backward=kind == "step") / statistics.median(row.ms[kind]) * 1e3
    found[f"{kind}_ms"] = row.ms[kind]
    found[f"{kind}_tflops"] = rate / 1e12
    found[f"{kind}_share"] = rate / bound
  return found


def shown(found: dict[str, Any]) -> str:
  """A row in one line."""
  cells = []
  for kind in KINDS:
    times = found[f"{kind}_ms"]
    cells.append(
      f"{statistics.median(times):9.2f} ms ({min(times):.2f} to {max(times):.2f})"
      f"{found[f'{kind}_tflops']:7.0f} TFLOP/s{found[f'{kind}_share']:7.3f}"
    )
  return (
    f"{found['name']:<28}" + "".join(cells) + f"{found['step_gb']:7.1f} GB, "
    f"error {found['error']:.4f}, of gradients {found['gradient_error']:.4f}, "
    f"compiled in {found['step_compile_s']:.0f} s"
  )


def wrong(found: list[dict[str, Any]]) -> list[str]:
  """Names of rows whose results are not what float32 gives; rows that drop may be."""

  def bad(row):
    errors = (row["error"], row["gradient_error"])
    return not row["drops"] and not all(e < WRONG for e in errors)

  return [row["name"] for row in found if bad(row)]


def tokens(shape: Shape, count: int = 4) -> list[int]:
  """The tokens whose results are compared with float32."""
  return tokens_of(shape.tokens, count)


def tokens_of(number: int, count: int = 4) -> list[int]:
  """The same, of so many tokens."""
  return list(range(0, number, max(1, number // count)))[:count]
