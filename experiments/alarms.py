"""What somebody should hear of while a run goes on: said once, counted always.

dead experts      an expert without load in `DEAD_LINES` watched steps in a row;
                  counted for each expert of each layer, anew each time it dies
load skew         the busiest expert of a layer had more than `SKEW` times the mean
                  load in `SKEW_LINES` watched steps in a row; counted for each layer.
                  Where k choices of E experts make no more than E / k times of it, nine
                  tenths of the way there from an even load are enough
non-finite loss   a step that was skipped, for its loss or gradient is no number
"""
# SPDX-License-Identifier: Apache-2.0

import collections
from collections.abc import Mapping, Sequence
from typing import Any

DEAD_LINES = 5
SKEW = 4.0
SKEW_LINES = 5


class Alarms:
  """Counts by name; each call returns what is to be said for the first time."""

  def __init__(self):
    self.counts: dict[str, int] = {}
    self._streaks: collections.Counter[tuple[Any, ...]] = collections.Counter()

  def metrics(self, step: int, values: Mapping[str, float]) -> list[str]:
    """Takes the scalars of a step.

    Args:
      step: counted from one.
      values: a line of metrics.jsonl.
    """
    if not values.get("skipped"):
      return []
    return self._raised(
      "non-finite loss",
      f"step {step} was skipped: its loss or gradient is not finite; the first hundred "
      "such batches are kept in skipped/.",
    )

  def routing(self, step: int, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Takes what the routers did in a watched step.

    Args:
      step: counted from one.
      layers: a line of routing.jsonl.
    """
    found = []
    for layer in layers:
      name, load = layer["name"], layer["load"]
      for expert, count in enumerate(load):
        if self._lasts((name, expert), count == 0, DEAD_LINES):
          found += self._raised(
            "dead experts",
            f"expert {expert} of {name} had no token in {DEAD_LINES} watched steps up "
            f"to step {step}.",
          )
      skew = max(load) * len(load) / max(sum(load), 1)
      bound = _bound(len(load), layer.get("choices"))
      if self._lasts((name,), skew > bound, SKEW_LINES):
        found += self._raised(
          "load skew",
          f"the busiest expert of {name} had {skew:.1f} times the mean load at step "
          f"{step}, and over {bound:.3g} times for {SKEW_LINES} watched steps.",
        )
    return found

  def _lasts(self, what: tuple[Any, ...], holds: bool, lines: int) -> bool:
    """Whether it has just held for so many lines in a row."""
    self._streaks[what] = self._streaks[what] + 1 if holds else 0
    return self._streaks[what] == lines

  def _raised(self, name: str, message: str) -> list[str]:
    self.counts[name] = self.counts.get(name, 0) + 1
    return [f"{name}: {message}"] if self.counts[name] == 1 else []


def _bound(num_experts: int, choices: int | None) -> float:
  """Skew that is too much; a token chooses no expert twice, so some cannot be."""
  if not choices:
    return SKEW
  return min(SKEW, 1 + 0.9 * (num_experts / choices - 1))
