"""Charts of runs as SVG text: matplotlib draws, the page places.

One figure shows one run, or all runs in the colours of `colours`.  Text stays text, so
that the page's font is used and it can be searched.
"""
# SPDX-License-Identifier: Apache-2.0

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

from experiments.reporting.grouping import arm_key
from experiments.reporting.read import Recorded, Routing

# Told apart by people who see colours differently (Okabe and Ito 2008); dark ones.
PALETTE = (
  "#0072b2", "#d55e00", "#009e73", "#a0527d", "#b08900", "#3b3b98", "#56b4e9", "#444444"
)  # fmt: skip
_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_POINTS = 400  # of a curve of training
_FEW_POINTS = 150  # of one of many
STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",
  "svg.hashsalt": "jmoe",  # equal runs give equal bytes
  "text.parse_math": False,  # a name may hold a dollar sign
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#999999",
  "axes.labelcolor": "#444444",
  "axes.linewidth": 0.8,
  "xtick.color": "#777777",
  "ytick.color": "#777777",
  "xtick.labelcolor": "#444444",
  "ytick.labelcolor": "#444444",
  "axes.grid": True,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.7,
  "axes.axisbelow": True,
}


def colours(runs: Sequence[Recorded]) -> list[tuple[str, object]]:
  """(colour, dash) of each run: a colour for an arm, a dash for a seed of it."""
  arms = list(dict.fromkeys(map(arm_key, runs)))
  seen: dict[str, int] = {}
  found = []
  for run in runs:
    arm = arm_key(run)
    number = seen[arm] = seen.get(arm, -1) + 1
    colour = PALETTE[arms.index(arm) % len(PALETTE)]
    found.append((colour, _STYLES[number % len(_STYLES)]))
  return found


def curves(runs: Sequence[Recorded]) -> str:
  """Bits per byte, the norm of gradients and speed over steps, of all runs."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(12.2, 3.2), layout="constrained")
    loss, norm, speed = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for run, (colour, dash) in zip(runs, colours(runs), strict=True):
      step = run.metrics.get("step", np.zeros(0))
      for axes, name in (
        (loss, "bits_per_byte"),
        (norm, "gradient_norm"),
        (speed, "tokens_per_second"),
      ):
        if name in run.metrics:
          _curve(axes, step, run.metrics[name], colour, dash)
      if (end := run.bits_per_byte.get("all")) is not None and len(step):
        loss.plot(step[-1], end, "o", color=colour, markersize=5, clip_on=False)
    _titled(loss, "bits per byte of the batch; dots: held-out text at the end")
    _titled(norm, "norm of gradients")
    _titled(speed, "tokens a second")
    _past_the_start(loss, runs)
    if any((run.metrics.get("gradient_norm", np.zeros(0)) > 0).any() for run in runs):
      norm.set_yscale("log")
      norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      norm.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
      norm.yaxis.set_minor_formatter(NullFormatter())
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, norm, speed):
      axes.set_xlabel("step")
    return svg(figure, "Curves of training")


def drops(routing: Routing, *, top: float, until: int) -> str:
  """Share of choices that were dropped over steps, by cause.

  Args:
    routing: of a run.
    top: of the axis, and
    until: its last step, the same for runs that are compared.
  """
  causes = dict.fromkeys(c for layer in routing.layers for c in layer.dropped)
  with matplotlib.rc_context(STYLE):
    figure, axes = _single()
    for colour, cause in zip(PALETTE * 2, causes, strict=False):
      shares = np.stack(
        [x.dropped[cause] for x in routing.layers if cause in x.dropped]
      )
      step, low, mean, high = (
        binned(x, _FEW_POINTS)
        for x in (routing.step, shares.min(0), shares.mean(0), shares.max(0))
      )
      axes.plot(step, 100 * mean, label=cause, **_line(step, colour))
      axes.fill_between(step, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
    axes.set_ylim(0, max(100 * top * 1.05, 1.0))
    axes.set_xlim(0, 1.02 * until)
    axes.set_xlabel("step")
    _titled(axes, "% of choices dropped: mean of layers; band: least to most")
    if causes:
      axes.legend(frameon=False, fontsize=8)
    return svg(figure, "Choices dropped, by cause")


def by_layer(
  routing: Routing,
  values: Callable[[int], np.ndarray],
  *,
  title: str,
  top: float,
  until: int,
  whole: bool = False,
) -> str:
  """A line for each layer over steps, from light (first layer) to dark.

  Args:
    routing: for the steps and the names.
    values: number of a layer -> f64[N].
    title: of the axis.
    top: of the axis, and
    until: its last step, the same for runs that are compared.
    whole: the values are counts.
  """
  shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(routing.layers)))
  with matplotlib.rc_context(STYLE):
    figure, axes = _single()
    step = binned(routing.step, _FEW_POINTS)
    for n, (layer, shade) in enumerate(zip(routing.layers, shades, strict=True)):
      line = binned(values(n).astype(np.float64), _FEW_POINTS)
      axes.plot(step, line, label=layer.name, **_line(step, shade))
    axes.set_ylim(0, max(top * 1.05, 1e-3))
    axes.set_xlim(0, 1.02 * until)
    if whole:
      axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    _titled(axes, title)
    if len(routing.layers) <= 6:
      axes.legend(frameon=False, fontsize=8)
    return svg(figure, title)


def binned(values: np.ndarray, most: int) -> np.ndarray:
  """At most `most` means along the first dimension."""
  if len(values) <= most:
    return values
  ends = np.linspace(0, len(values), most + 1).astype(int)
  return np.stack([values[a:b].mean(0) for a, b in zip(ends[:-1], ends[1:])])


def _single() -> tuple[Figure, Axes]:
  figure = Figure(figsize=(5.4, 2.3), layout="constrained")
  return figure, figure.subplots()


def _curve(axes: Axes, step, values, colour, dash) -> None:
  """Every step thin, and a mean over 2 % of the run."""
  width = max(1, len(step) // 50)
  if width > 1:
    thin = (binned(step, _POINTS), binned(values, _POINTS))
    axes.plot(*thin, color=colour, linewidth=0.5, alpha=0.3)
    values = _moving_mean(values, width)
  axes.plot(
    binned(step, _POINTS), binned(values, _POINTS),
    linestyle=dash, **_line(step[np.isfinite(values)], colour),
  )  # fmt: skip


def _line(step: np.ndarray, colour: Any) -> dict[str, Any]:
  """How a line looks; one step alone is a dot, also among others without a number."""
  marker = "o" if len(step) == 1 else ""
  return {"color": colour, "linewidth": 1.3, "marker": marker, "markersize": 4}


def _past_the_start(axes: Axes, runs: Sequence[Recorded]) -> None:
  """Leaves the first drop above the picture: all that matters happens below it."""
  seen = []
  for run in runs:
    bits = run.metrics.get("bits_per_byte", np.zeros(0))
    bits = bits[len(bits) // 20 :]
    seen += [bits[np.isfinite(bits)], np.array(list(run.bits_per_byte.values())[-1:])]
  values = np.concatenate(seen) if seen else np.zeros(0)
  if len(values):
    low, high = values.min(), values.max()
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)


def _titled(axes: Axes, title: str) -> None:
  axes.set_title(title, color="#333333")


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
  """The mean of up to `width` values to each side and before, whatever is finite."""
  good = np.isfinite(values)
  sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(good)])
  end = np.arange(1, len(values) + 1)
  start = np.maximum(end - width, 0)
  number = counts[end] - counts[start]
  total = sums[end] - sums[start]
  return np.divide(total, number, out=np.full(len(end), np.nan), where=number > 0)


def svg(figure: Figure, label: str) -> str:
  """An <svg> element without what would clash with another one on the page."""
  stream = io.StringIO()
  none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(stream, format="svg", metadata=none, transparent=True)
  text = stream.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
  text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
  text = re.sub(r'<g id="[^"]*">', "<g>", text)  # axes_1 and such, in every figure
  text = re.sub(r' d="[^"]*"', _rounded, text)
  width, _ = figure.get_size_inches()
  style = f'role="img" aria-label="{label}" style="max-width: {width:.2f}in"'
  return text.replace("<svg", f"<svg {style}", 1)


def _rounded(path: re.Match[str]) -> str:
  """Hundredths of a point are enough; matplotlib writes millionths."""
  return re.sub(r"(\.\d\d)\d+", r"\1", path.group()).replace(" \n", "\n")
