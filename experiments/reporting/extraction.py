"""Bits per byte against experts kept, a panel for each domain: one figure."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.reporting.charts import PALETTE, STYLE

_WIDE = 4  # panels of a row


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Writes the figure; its kind is that of the file's name.

  Args:
    found: as of `figure`.
    path: .svg, .png or .pdf.

  Raises:
    ValueError: another kind of file.
  """
  with matplotlib.rc_context(STYLE):
    figure(found).savefig(path)


def figure(found: Sequence[Mapping[str, Any]]) -> Figure:
  """The curves; drawn under `charts.STYLE` they look like the others.

  Args:
    found: records of `experiments.emo`: of each run its arm and cases.
  """
  domains = list(dict.fromkeys(c["domain"] for r in found for c in r["cases"]))
  arms = list(dict.fromkeys(record["arm"] for record in found))
  most = max(c["documents"] for r in found for c in r["cases"])
  rows = math.ceil(len(domains) / _WIDE)
  drawn = Figure(figsize=(3 * min(len(domains), _WIDE), 2.3 * rows + 0.4))
  panels = drawn.subplots(rows, min(len(domains), _WIDE), squeeze=False).ravel()
  for panel, domain in zip(panels, domains, strict=False):
    panel.set_title(domain)
    panel.set_xscale("log", base=2)
    panel.invert_xaxis()
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    for n, arm in enumerate(arms):
      colour = PALETTE[n % len(PALETTE)]
      for documents, style in ((most, "-"), (0, ":")):
        x, y = _curve(found, arm, domain, documents)
        label = f"{arm}, {documents or 'random'}"
        panel.plot(x, y, style, color=colour, marker=".", label=label)
  for panel in panels[len(domains) :]:
    panel.set_axis_off()
  panels[0].set_ylabel("bits per byte")
  lines, labels = panels[0].get_legend_handles_labels()
  drawn.legend(lines, labels, loc="upper center", ncols=len(arms), frameon=False)
  drawn.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (2.3 * rows + 0.4)))
  return drawn


def _curve(
  found: Sequence[Mapping[str, Any]], arm: str, domain: str, documents: int
) -> tuple[list[float], list[float]]:
  """(shares, mean bits per byte over seeds and draws); the whole model begins both."""
  by_share: dict[float, list[float]] = {}
  for record in found:
    for case in record["cases"]:
      fits = case["documents"] == documents or case["share"] == 1
      if record["arm"] == arm and case["domain"] == domain and fits:
        by_share.setdefault(case["share"], []).append(case["bits"])
  shares = sorted(by_share, reverse=True)
  return shares, [sum(by_share[s]) / len(by_share[s]) for s in shares]
