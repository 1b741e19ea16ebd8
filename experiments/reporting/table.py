"""What `experiments.compare` found, as text for a terminal."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import intervals

_UNKNOWN = "-"
_MOST_DIFFERENCES = 20


def table(found: Mapping[str, Any]) -> str:
  """Lines of a table of arms, and a block for each arm that is not the first."""
  arms = found["arms"]
  rows = [["", *arms], ["seeds", *(_seeds(arm) for arm in arms.values())]]
  domains = dict.fromkeys(d for arm in arms.values() for d in arm["bits_per_byte"])
  for domain in sorted(domains, key=lambda d: d == "all"):
    values = [_interval(arm["bits_per_byte"].get(domain), 4) for arm in arms.values()]
    rows.append([f"bits/byte, {domain}", *values])
  for title, key in (
    ("parameters", "parameters"),
    ("active parameters", "active_parameters"),
    ("FLOPs a trained token", "flops_per_token"),
    ("FLOPs trained", "flops_trained"),
  ):
    rows.append([title, *(short(arm[key]) for arm in arms.values())])
  speeds = [arm["tokens_per_second"] for arm in arms.values()]
  rows.append(["tokens a second", *(short(s and s["mean"]) for s in speeds)])
  blocks = [aligned(rows)]
  blocks += [
    f"{name}: its seeds have different texts; their bits per byte do not compare."
    for name, arm in arms.items()
    if not arm["same_text"]
  ]
  blocks += [
    _against(name, found["first"], against)
    for name, against in found["against"].items()
  ]
  return "\n\n".join(blocks)


def short(number: float | None) -> str:
  """A number with three digits and a letter: '1.23M'.

  >>> [short(x) for x in (None, 0, 12, 1234, 999_900, 7.89e15)]
  ['-', '0', '12', '1.23k', '1.00M', '7.89P']
  """
  if number is None:
    return _UNKNOWN
  for letter, size in zip("EPTGMk", (1e18, 1e15, 1e12, 1e9, 1e6, 1e3), strict=True):
    if number >= 0.9995 * size:  # what would be shown as 1000 of the next letter
      return f"{number / size:#.3g}".rstrip(".") + letter
  return f"{number:g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Columns under each other, the first to the left and the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
    for row in rows
  )


def _against(name: str, first: str, found: Mapping[str, Any]) -> str:
  seeds = found["paired_seeds"]
  of = f"over seeds {', '.join(map(str, seeds))}" if seeds else "of different seeds"
  lines = [f"{name} against {first}, {of}"]
  if not found["same_text"]:
    lines.append("  their texts are different: bits per byte do not compare")
  rows = [
    [f"  bits/byte, {domain}", _interval(difference, 4, sign=True)]
    for domain, difference in found["bits_per_byte"].items()
    if difference is not None
  ]
  if (pooled := found["pooled_deviations"]) is not None:
    rows.append(["  gap in pooled deviations", f"{pooled:.1f}"])
  factor = found["compute_to_equal_loss"]
  rows.append(["  compute to equal loss", _interval(factor, 2, unit="x fewer FLOPs")])
  width = max(len(row[0]) for row in rows)
  lines += [f"{title.ljust(width)}  {value}" for title, value in rows]
  shown = found["config"][:_MOST_DIFFERENCES]
  lines += [f"  config {text}" for text in shown]
  if (more := len(found["config"]) - len(shown)) > 0:
    lines.append(f"  and {more} more, all in --json")
  return "\n".join(lines)


def _seeds(arm: Mapping[str, Any]) -> str:
  seeds = ", ".join(map(str, arm["seeds"]))
  return seeds if arm["finished"] else f"{seeds} (at step {arm['steps']})"


def _interval(
  found: Mapping[str, Any] | None, digits: int, *, unit: str = "", sign: bool = False
) -> str:
  if found is None:
    return _UNKNOWN
  interval = intervals.Interval(**found)
  plus = "+" if sign and interval.mean > 0 else ""
  return plus + intervals.shown(interval, digits) + (f" {unit}" if unit else "")
