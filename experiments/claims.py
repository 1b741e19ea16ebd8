"""What a series of arms says, read from the folders of its runs."""
# SPDX-License-Identifier: Apache-2.0

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import equal_loss, intervals, results
from jmoe.use import to_jsonable


class Quantity(NamedTuple):
  """One number a seed."""

  claim: str
  unit: str
  scale: str = "linear"


QUANTITIES = {
  "bits_per_byte": Quantity("held-out text, all domains", "bits per byte"),
  "compute": Quantity(
    "training FLOPs that the compared arm needs for the higher of the two last losses, "
    "over what this arm needs for it",
    "times fewer FLOPs",
    "log",
  ),
  "compute_planned": Quantity(
    "training FLOPs of the compared arm, over those of a run of this arm that was "
    "planned to end at the same held-out loss",
    "times fewer FLOPs",
    "log",
  ),
  "step_ms": Quantity(
    "time of a step, divided by the seeds that share it", "ms", "log"
  ),
  "memory_gib": Quantity(
    "arguments and temporaries of a compiled step, divided by the seeds that share it",
    "GiB",
    "log",
  ),
  "dropped": Quantity("share of choices dropped, last tenth of the steps", "share"),
  "dead_experts": Quantity(
    "experts, of all layers, that no token of the held-out text asks for", "experts"
  ),
  "skew": Quantity(
    "load of the busiest expert of the worst layer over the mean, last tenth of the "
    "steps",
    "times the mean",
  ),
}

_SHARED = ("step_ms", "memory_gib")  # once an arm, listed under its first seed

Measured = Mapping[str, Mapping[str, Mapping[int, float]]]  # quantity, arm, seed


def measured(
  arms: Sequence[Any], against: str
) -> dict[str, dict[str, dict[int, float]]]:
  """Every quantity of every arm, by seed; what an arm does not have is left out.

  Args:
    arms: with `name`, `runs` and `folders`, all finished.
    against: name of the arm that the others are compared with.
  """
  found: dict[str, dict[str, dict[int, float]]] = {name: {} for name in QUANTITIES}
  base = next(arm for arm in arms if arm.name == against)
  curves = {
    run.seed: _curve(_metrics(folder), folder)
    for run, folder in zip(base.runs, base.folders, strict=True)
  }
  for arm in arms:
    for run, folder in zip(arm.runs, arm.folders, strict=True):
      values = _values(folder)
      if run is not arm.runs[0]:  # the same program: no interval to be had from it
        values = {name: x for name, x in values.items() if name not in _SHARED}
      if arm.name != against:
        own = _curve(_metrics(folder), folder)
        values["compute"] = equal_loss.factor(own, curves[run.seed])
      for name, value in values.items():
        found[name].setdefault(arm.name, {})[run.seed] = value
  found["compute_planned"] = _planned(arms, base)
  return found


def _planned(arms: Sequence[Any], base: Any) -> dict[str, dict[int, float]]:
  """Quotient of FLOPs at the compared arm's end, from `sparse` and arms `steps=F`.

  Between two lengths the loss is taken as a straight line over the logarithm of FLOPs;
  a seed whose runs do not enclose the compared loss gives no value.
  """
  lengths = [a for a in arms if a.name == "sparse" or a.name.startswith("steps=")]
  found: dict[int, float] = {}
  if len(lengths) < 2 or base in lengths:
    return {}
  for n, run in enumerate(base.runs):
    target, whole = _end(base.folders[n])
    ends = sorted(_end(arm.folders[n]) for arm in lengths)
    losses, logs = [bits for bits, _ in ends], [math.log(flops) for _, flops in ends]
    if losses[0] <= target <= losses[-1]:
      found[run.seed] = whole / math.exp(float(np.interp(target, losses, logs)))
  return {"sparse": found} if found else {}


def _end(folder: Any) -> tuple[float, float]:
  """(held-out bits per byte, FLOPs of training)."""
  summary = json.loads((folder / "summary.json").read_text())
  return summary["bits_per_byte"]["all"], summary["flops"]["trained"]


def append(
  found: Measured,
  arms: Sequence[Any],
  *,
  against: str,
  folder: Path,
  name: str,
  command: Callable[[str], str],
) -> None:
  """Puts all values into FOLDER/NAME-QUANTITY.json.

  Args:
    found: from `measured`.
    arms: with `name`, `runs` and `folders`, all finished.
    against: name of the arm that the others are compared with.
    folder: of claims.
    name: begins the names of the files.
    command: of an arm by its name.

  Raises:
    BadData: a file holds something else.
  """
  for quantity, by_arm in found.items():
    about = QUANTITIES[quantity]
    for arm in arms:
      config = to_jsonable(arm.runs[0])
      del config["seed"], config["data"]["seed"]
      for run, place in zip(arm.runs, arm.folders, strict=True):
        if run.seed not in by_arm.get(arm.name, {}):
          continue
        summary = json.loads((place / "summary.json").read_text())
        config["data"]["digest"] = summary["data"]["digest"]
        compared = against in by_arm
        results.append(
          folder / f"{name}-{quantity}.json",
          claim=about.claim,
          unit=about.unit,
          scale=about.scale,
          against=against if compared and about.scale == "linear" else None,
          arm=arm.name,
          seed=run.seed,
          value=by_arm[arm.name][run.seed],
          command=command(arm.name),
          config=config,
          versions=summary["versions"],
          hardware=summary["hardware"],
        )


def show(found: Measured) -> None:
  """Prints means with their intervals."""
  for quantity, by_arm in found.items():
    about = QUANTITIES[quantity]
    if not by_arm:
      continue
    print(f"{quantity}: {about.claim}, {about.unit}")
    mean = intervals.geometric if about.scale == "log" else intervals.student
    for arm, values in by_arm.items():
      interval = mean(list(values.values()))
      seeds = " ".join(f"{value:.4g}" for value in values.values())
      width = ""
      if interval.low is not None:
        width = f" [{interval.low:.4g}, {interval.high:.4g}]"
      print(f"  {arm:<16}{interval.mean:>10.4g}{width:<24} ({seeds})")


def _values(folder: Any) -> dict[str, float]:
  summary = json.loads((folder / "summary.json").read_text())
  together = summary.get("seeds_at_once")  # None: of sittings that differ
  run = json.loads((folder / "config.json").read_text())
  tokens = run["data"]["batch"] * run["data"]["seq"]
  values = {"bits_per_byte": summary["bits_per_byte"]["all"]}
  if (used := summary.get("memory")) and together:
    bytes_ = used["arguments"] + used["temporary"]
    values["memory_gib"] = bytes_ / together / 2**30
  if summary["tokens_per_second"] and together:
    values["step_ms"] = 1e3 * tokens / summary["tokens_per_second"] / together
  lines = _metrics(folder)
  last = lines[-max(1, len(lines) // 10) :]
  if "dropped" in last[0]:
    values["dropped"] = float(np.mean([line["dropped"] for line in last]))
    values["skew"] = float(np.mean([line["skew"] for line in last]))
    layers = json.loads((folder / "evaluation.json").read_text())["layers"]
    loads = [np.sum(layer["load"], axis=0) for layer in layers]
    values["dead_experts"] = float(sum((load == 0).sum() for load in loads))
  return values


def _metrics(folder: Any) -> list[dict[str, Any]]:
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _curve(lines: list[dict[str, Any]], folder: Any) -> equal_loss.Curve:
  summary = json.loads((folder / "summary.json").read_text())
  each = summary["flops"]["trained"] / summary["steps"]
  flops = np.array([line["step"] * each for line in lines])
  bits = np.array(
    [math.nan if line.get("skipped") else line["bits_per_byte"] for line in lines]
  )
  return equal_loss.Curve(flops, bits)
