"""RESULTS.md: the claims of a folder as tables."""
# SPDX-License-Identifier: Apache-2.0

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import results
from experiments.errors import BadData

_HEAD = """\
# Results

Built by `python -m experiments.results` from the JSON files beside it; a test fails if
it is stale. One value is one seed. Intervals are Student's, of 95 %, of the mean over
seeds; a difference is of equal seeds, pair by pair, and its gap is also given in pooled
standard deviations of one seed.
"""


def page(folder: pathlib.Path) -> str:
  """The whole text.

  Raises:
    BadData: the folder is missing, or a file in it is no result.
  """
  if not folder.is_dir():
    raise BadData(f"--folder {folder}: no such folder.")
  sections = [_section(path) for path in sorted(folder.glob("*.json"))]
  return "\n".join([_HEAD, *sections])


def _section(path: pathlib.Path) -> str:
  found = results.read_json(path)
  if "rows" not in found:
    return _claim(path, results.read(path))
  try:
    return _benchmark(path, found)
  except (KeyError, TypeError):
    raise BadData(
      f"{path} has rows, but not those of experiments.benchmarks.layer."
    ) from None


def _series(path: pathlib.Path) -> str:
  """'NAME: ' of NAME-QUANTITY.json, so that two series' sections differ in title."""
  name, dash, _ = path.stem.rpartition("-")
  return f"{name}: " if dash else ""


def _claim(path: pathlib.Path, found: Mapping[str, Any]) -> str:
  log = found["scale"] == "log"
  rows = []
  for arm, facts in found["arms"].items():
    values = ", ".join(_number(value) for value in facts["values"].values())
    seeds = ", ".join(facts["values"])
    rows.append([arm, seeds, values, _interval(found["interval"][arm])])
  mean = "geometric mean" if log else "mean"
  parts = [
    f"## {_series(path)}{found['claim']}\n",
    f"In {found['unit']}; [{path.name}]({path.name}).\n",
    _table(["arm", "seeds", "values", f"{mean}, 95 % interval"], rows),
  ]
  if found["difference"]:
    sign = "divided by" if log else "minus"
    rows = [
      [
        f"{arm} {sign} {found['against']}",
        str(gap["count"]),
        _interval(gap),
        "" if gap["pooled_deviations"] is None else f"{gap['pooled_deviations']:.1f}",
      ]
      for arm, gap in found["difference"].items()
    ]
    head = ["difference", "pairs", f"{mean}, 95 % interval", "pooled deviations"]
    parts.append(_table(head, rows))
  parts.append(_provenance(found["arms"]))
  return "\n".join(parts)


def _provenance(arms: Mapping[str, Mapping[str, Any]]) -> str:
  """Commands, hardware, versions and days, said once for all arms that share them."""
  lines = []
  for title, show in (
    ("command", lambda facts: f"`{facts['command']}`"),
    ("hardware", lambda facts: _pairs(facts["hardware"])),
    ("versions", lambda facts: _pairs(facts["versions"])),
    ("measured", lambda facts: ", ".join(sorted(set(facts["dates"].values())))),
  ):
    said: dict[str, list[str]] = {}
    for arm, facts in arms.items():
      said.setdefault(show(facts), []).append(arm)
    for text, who in said.items():
      of = "" if len(said) == 1 else f" of {', '.join(who)}"
      lines.append(f"- {title}{of}: {text}")
  return "\n".join(lines) + "\n"


def _benchmark(path: pathlib.Path, found: Mapping[str, Any]) -> str:
  """A file of `experiments.benchmarks.layer`: medians, and ratios to the first row."""
  rows = []
  for row in found["rows"]:
    cells = [row["name"]]
    for name in ("forward", "step"):
      one = row[name]
      spread = f"({one['ratio_low']:.2f} to {one['ratio_high']:.2f})"
      cells += [f"{one['ms']:.1f}", f"{one['ratio']:.2f} {spread}"]
    rows.append([*cells, f"{row['step']['temp_mib']:.0f}"])
  head = ["", "forward, ms", "x dense (range)", "forward and backward, ms"]
  head += ["x dense (range)", "temporary MiB"]
  what = found["what"]
  where = f"{found['machine']}, {found['cores']} cores"
  return "\n".join(
    [
      f"## {what[:1].upper()}{what[1:]}: {found['shape']['experts']} experts\n",
      f"Medians, and medians of ratios within a round; [{path.name}]({path.name}).\n",
      _table(head, rows),
      f"- shape: {_pairs(found['shape'])}",
      f"- command: `{found['command']}`",
      f"- hardware: {where}",
      f"- versions: {_pairs(found['versions'])}\n",
    ]
  )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "".join(
    "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n"
    for line in lines
  )


def _interval(found: Mapping[str, Any]) -> str:
  if found["low"] is None:
    return f"{_number(found['mean'])} (one value)"
  return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float) -> str:
  return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _pairs(found: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in found.items())
