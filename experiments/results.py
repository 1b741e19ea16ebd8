"""Results as data: a claim is a JSON file, and RESULTS.md is built from all of them.

  python -m experiments.results            writes experiments/results/RESULTS.md
  python -m experiments.results --check    says whether it is what the files say

A file `NAME.json` holds one quantity, measured once for each seed of each arm:

  {"claim": what is said, "unit": of the values, "scale": "linear" or "log",
   "against": the arm that the others are compared with, or null,
   "arms": {ARM: {"values": {SEED: number}, "dates": {SEED: day},
                  "command", "config", "versions", "hardware"}},
   "interval": {ARM: of the mean},
   "difference": {ARM: of the mean of ARM - against over the seeds of both}}

Intervals are Student's of 95 %, with scale "log" of the logarithms, so that means are
geometric and differences are ratios.  `append` adds a value and makes the intervals
anew; a series may so take several sittings, and stop anywhere.

Files of `experiments.benchmarks.layer` may lie there too.

Exit codes: 0 done, 1 stale, 2 a file cannot be understood.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import intervals
from experiments.errors import BadData
from experiments.parser import Parser

FOLDER = pathlib.Path(__file__).parent / "results"
PAGE = "RESULTS.md"
_FACTS = ("command", "config", "versions", "hardware")
_KEYS = ("claim", "unit", "scale", "against", "arms", "interval", "difference")


def append(
  path: pathlib.Path,
  *,
  claim: str,
  unit: str,
  arm: str,
  seed: int,
  value: float,
  command: str,
  config: Mapping[str, Any],
  versions: Mapping[str, str],
  hardware: Mapping[str, Any],
  against: str | None = None,
  scale: str = "linear",
) -> dict[str, Any]:
  """Puts the value of a seed into a claim's file, or makes the file; returns it whole.

  The file is always whole, and several processes may append to it.  A value that is
  there already may be given again.

  Args:
    path: of the file.
    claim: one sentence.
    unit: of the value, such as "bits per byte".
    arm: what was measured, such as "dense".
    seed: of the run.
    value: of the seed.
    command: that measures this arm, whatever the seed.
    config: of the arm, as JSON has it and without seeds.
    versions: of the packages that the value depends on.
    hardware: it was measured on.
    against: arm that the others are compared with, over the seeds that both have.
    scale: "linear", or "log" for ratios.

  Raises:
    BadData: the file is of another claim; its arm has another command, config, version
      or hardware; or the seed has another value.
    ValueError: a value that is not finite, or an unknown scale.
  """
  _check_value(path, value, scale)
  facts = {
    "command": command,
    "config": config,
    "versions": versions,
    "hardware": hardware,
  }
  facts = json.loads(json.dumps(facts))  # as it will be read again
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked(path.parent):
    found = read(path) if path.exists() else {"arms": {}}
    head = {"claim": claim, "unit": unit, "scale": scale, "against": against}
    _same(path, "", {k: v for k, v in found.items() if k in head} or head, head)
    old = found["arms"].get(arm, {"values": {}, "dates": {}, **facts})
    _same(path, f"arm {arm!r}: ", {name: old[name] for name in _FACTS}, facts)
    known = old["values"].get(str(seed), value)
    if known != value:
      raise BadData(
        f"{path}, arm {arm!r}: seed {seed} has the value {known} already, not {value}; "
        "remove it first, or give another arm."
      )
    if str(seed) not in old["values"]:
      old["values"][str(seed)] = value
      old["dates"][str(seed)] = datetime.date.today().isoformat()
    claimed = head | {"arms": found["arms"] | {arm: old}}
    claimed |= with_intervals(claimed)
    from etils import epath

    from experiments.workdir import write_json

    write_json(epath.Path(path), claimed)
  return claimed


def with_intervals(claimed: Mapping[str, Any]) -> dict[str, Any]:
  """`interval` and `difference` of a claim, from its values.

  A difference also has `pooled_deviations`: the gap of the two means in pooled standard
  deviations of one seed.
  """
  log = claimed["scale"] == "log"
  mean = intervals.geometric if log else intervals.student
  values = {arm: facts["values"] for arm, facts in claimed["arms"].items()}
  base = values.get(claimed["against"])
  found: dict[str, Any] = {"interval": {}, "difference": {}}
  for arm, own in values.items():
    found["interval"][arm] = intervals.jsonable(mean(list(own.values())))
    shared = [seed for seed in own if base is not None and seed in base]
    if base is None or arm == claimed["against"] or not shared:
      continue
    pairs = [(own[seed], base[seed]) for seed in shared]
    gap = mean([a / b if log else a - b for a, b in pairs])
    both = [[math.log(x) if log else x for x in v.values()] for v in (own, base)]
    found["difference"][arm] = gap._asdict() | {
      "pooled_deviations": intervals.pooled_deviations(*both)
    }
  return found


def read(path: pathlib.Path) -> dict[str, Any]:
  """A claim, checked.

  Raises:
    BadData: it is not one, or its intervals are not those of its values.
  """
  found = read_json(path)
  missing = [key for key in _KEYS if key not in found]
  if missing:
    raise BadData(f"{path} is not a claim: it has no {missing[0]!r}.")
  for arm, facts in found["arms"].items():
    missing = [k for k in (*_FACTS, "values", "dates") if k not in facts]
    if missing or not facts["values"]:
      raise BadData(f"{path}, arm {arm!r} has no {(missing or ['values'])[0]!r}.")
    for value in facts["values"].values():
      _check_value(path, value, found["scale"])
  again = with_intervals(found)
  if not _close(again, {key: found[key] for key in again}):
    raise BadData(
      f"{path}: its intervals are not those of its values; was it edited by hand?"
    )
  return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """An object.

  Raises:
    BadData: it is none.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    raise BadData(f"{path} is not JSON.") from None
  if not isinstance(found, dict):
    raise BadData(f"{path} is not a JSON object.")
  return found


def _check_value(path: pathlib.Path, value: Any, scale: str) -> None:
  if scale not in ("linear", "log"):
    raise BadData(f"{path}: scale={scale!r}; give 'linear' or 'log'.")
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value) or (scale == "log" and value <= 0):
    over = " over 0" if scale == "log" else ""
    raise BadData(f"{path}: value={value!r}; give a finite number{over}.")


def _same(path: pathlib.Path, where: str, old: Any, new: Any) -> None:
  from experiments.workdir import differences, listed

  if found := differences(old, new):
    raise BadData(
      f"{path}, {where}{listed(found)}; what differs does not belong together: give "
      "another arm, or another file."
    )


def _close(one: Any, other: Any) -> bool:
  """Equal trees, up to the rounding of another machine."""
  if isinstance(one, Mapping) and isinstance(other, Mapping):
    return one.keys() == other.keys() and all(_close(one[k], other[k]) for k in one)
  if isinstance(one, float) and isinstance(other, int | float):
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
  return one == other


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """One process at a time; a process that ends lets go."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.results",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, metavar="DIR")
  parser.add_argument("--check", action="store_true", help=f"write no {PAGE}")
  arguments = parser.parse_args(argv)
  from experiments.reporting.markdown import page

  target = arguments.folder / PAGE
  try:
    text = page(arguments.folder)
    old = target.read_text(encoding="utf-8") if target.exists() else None
    if arguments.check and text != old:
      print(f"{target} is stale; run: python -m experiments.results", file=sys.stderr)
      return 1
    if not arguments.check:
      target.write_text(text, encoding="utf-8")
  except (BadData, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{target} is what the files beside it say")
  return 0


if __name__ == "__main__":
  sys.exit(main())
