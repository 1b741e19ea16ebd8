"""The tables of the page that need no drawing: how well, how much, what went wrong."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting import grouping
from experiments.reporting.read import Recorded
from experiments.reporting.table import short

NONE = "–"


def progress(run: Recorded) -> str:
  """How far a run is."""
  if run.finished:
    return f"{run.step} steps"
  steps = run.config.get("steps")
  return f"at step {run.step}" + (f" of {steps}" if steps else "") + ", not finished"


def bits(named: Sequence[tuple[str, Recorded]]) -> dict[str, Any] | None:
  """Bits per byte by domain, of runs and of what needs no training."""
  columns: dict[str, Mapping[str, float]] = {
    label: run.bits_per_byte for label, run in named if run.bits_per_byte
  }
  trained = len(columns)
  if not trained:
    return None
  for _, run in named:
    for name, bits in run.summary.get("baselines", {}).items():
      columns.setdefault(name, bits)
  same = grouping.same_text([run for _, run in named])
  several = same and trained > 1
  domains = dict.fromkeys(d for bits in columns.values() for d in bits if d != "all")
  rows = []
  for domain in (*domains, "all"):
    values = [bits.get(domain) for bits in columns.values()]
    least = min((v for v in values[:trained] if v is not None), default=None)
    cells = [
      (NONE, False) if v is None else (f"{v:.3f}", several and v == least)
      for v in values
    ]
    rows.append((domain, cells))
  return {"head": list(columns), "rows": rows, "same_text": same}


def alarms(runs: Sequence[Recorded]) -> list[tuple[str, list[str]]]:
  """Rows of counts; of a run that has not summed up only the steps skipped."""
  names = dict.fromkeys(n for run in runs for n in run.summary.get("alarms", {}))
  rows = [
    (name, [_count(run, run.summary.get("alarms", {}).get(name, 0)) for run in runs])
    for name in names
  ]
  skipped = [_skipped(run) for run in runs]
  return [*rows, ("steps skipped, their loss not finite", skipped)]


def _count(run: Recorded, number: int) -> str:
  return str(number) if run.summary else NONE


def _skipped(run: Recorded) -> str:
  if run.finished:
    return str(run.summary.get("skipped_steps", NONE))
  counts = run.metrics.get("skipped", np.zeros(0))
  return str(int(np.nansum(counts)))


def summary(runs: Sequence[Recorded]) -> list[tuple[str, list[str]]]:
  """Rows of the table of summaries; a row that no run has is left out."""

  def of(*path: str, show: Callable[[Any], str] = str) -> list[str]:
    return [_shown(run.summary, path, show) for run in runs]

  keys = dict.fromkeys(
    (group, key)
    for group in ("policy", "versions", "hardware")
    for run in runs
    for key in run.summary.get(group, {})
  )
  rows = [
    ("folder", [str(run.path) for run in runs]),
    ("state", [progress(run) for run in runs]),
    ("seed", [str(run.seed) for run in runs]),
    ("parameters", of("parameters", "total", show=short)),
    ("parameters active for a token", of("parameters", "active", show=short)),
    ("FLOPs a trained token", of("flops", "per_token", show=short)),
    ("FLOPs trained", of("flops", "trained", show=short)),
    ("seconds", of("seconds", show=lambda x: f"{x:.1f}")),
    ("tokens a second", of("tokens_per_second", show=short)),
    ("data", of("data", "corpus")),
    ("digest of the data", of("data", "digest", show=lambda x: str(x)[:12])),
    *((f"{group}: {key}", of(group, key)) for group, key in keys),
    ("command", of("command", show=lambda x: x if isinstance(x, str) else " ".join(x))),
  ]
  return [row for row in rows if any(cell != NONE for cell in row[1])]


def _shown(tree: Any, path: Sequence[str], show: Callable[[Any], str]) -> str:
  for name in path:
    tree = tree.get(name) if isinstance(tree, Mapping) else None
  return NONE if tree is None else show(tree)
