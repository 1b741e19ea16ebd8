"""What the planner expected beside what was measured, and both beside the goals.

  python -m experiments.benchmarks.mesh_all.compare --planned FILE.json DIR
  python -m experiments.benchmarks.mesh_all.compare --planned FILE.json

DIR is of `mesh_all --out`; without it the prediction stands alone.  A time agrees
within 15% of the planned one, memory within 10%.  Exit codes: 0 done, 2 bad arguments.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.parser import Parser, run

FILE = "ended.jsonl"  # how each command ended
WITHIN = {"time": 0.15, "memory": 0.10}
PLANNED = Path(__file__).parent.parent / "planned" / "mesh_8_h200.json"
# Shape -> what the best strategy should keep of one GPU's rate over all GPUs, with as
# many tokens on each.
GOALS = {"mixtral": 0.90, "qwen3": 0.70, "olmoe": 0.75, "dsv3": 0.85, "dsv3-256": 0.85}
PUBLISHED = 277  # TFLOP/s a GPU of Qwen3-30B-A3B's training step on 8 GPUs
PEER, TIMES = "liger-cute-kernels", 1.3  # the rate that is wanted over it


class Pair(NamedTuple):
  """One figure, planned and measured."""

  part: str
  what: str
  kind: str  # of `WITHIN`
  unit: str
  planned: float
  measured: float

  @property
  def ratio(self) -> float:
    return self.measured / self.planned

  @property
  def agrees(self) -> bool:
    return abs(self.ratio - 1) <= WITHIN[self.kind]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.benchmarks.mesh_all.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("measured", type=Path, nargs="?", metavar="DIR")
  parser.add_argument("--planned", type=Path, default=PLANNED, metavar="FILE")
  arguments = parser.parse_args(argv)
  if not arguments.planned.is_file():
    parser.error(f"--planned {arguments.planned}: there is no such file")
  planned = json.loads(arguments.planned.read_text())
  folder = arguments.measured
  if folder is not None and not folder.is_dir():
    parser.error(f"{folder}: there is no such folder")
  last = {} if folder is None else {line["part"]: line for line in endings(folder)}
  for part, line in last.items():
    if line.get("beside"):
      print(f"{part}: taken while {line['beside']} others compiled, perhaps too slow")
  show(planned, {} if folder is None else read(folder))
  return 0


def endings(folder: Path) -> list[dict[str, Any]]:
  """The lines of `FILE`, less one that was cut off."""
  path, found = folder / FILE, []
  for text in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      found.append(json.loads(text))
  return found


def read(folder: Path) -> dict[str, Any]:
  """Part -> what its command wrote."""
  files = sorted(folder.glob("*.json"))
  return {file.stem: json.loads(file.read_text()) for file in files}


def show(planned: dict[str, Any], measured: dict[str, Any]) -> None:
  """Prints all figures that have both, how many agree, and the goals."""
  kinds = sorted({one.get("device", "?") for one in measured.values()})
  if measured:
    print(f"planned for {planned['chips']}, measured on {', '.join(kinds)}")
  if "cpu" in kinds:
    print("figures of a dry run on host devices: they say nothing about GPUs")
  pairs = list(paired(planned, measured))
  for pair in pairs:
    print(
      f"{pair.part:<14}{pair.what:<52}{pair.planned:9.4g} planned"
      f"{pair.measured:9.4g} measured {pair.unit:<5}{pair.ratio:6.2f}"
      f"{'' if pair.agrees else '  OFF'}"
    )
  for kind, most in WITHIN.items():
    of = [pair for pair in pairs if pair.kind == kind]
    if of:
      agree = sum(pair.agrees for pair in of)
      print(f"{kind}: {agree} of {len(of)} within {most:.0%} of the plan")
  if not pairs:
    print("nothing was measured; what is planned:")
  for line in goals(planned, measured):
    print(line)


def paired(planned: dict[str, Any], measured: dict[str, Any]) -> Iterator[Pair]:
  """Figures that were planned and measured."""
  for part, kinds in planned["parts"].items():
    found = measured.get(part)
    if found is None:
      continue
    for row in kinds.get("links", ()):
      for other in found["links"]:
        keys = ("gpus", "collective", "size")
        if all(other[k] == row[k] for k in keys) and "gb_s" in other:
          what = f"{row['gpus']} GPUs, {row['collective']}, {row['size']}"
          yield Pair(part, what, "time", "GB/s", row["gb_s"], other["gb_s"])
    for row in kinds.get("layers", ()):
      if (other := _row(found, row)) is not None:
        what = f"EP {row['gpus']}, {row['routing']}, {row['name']}"
        took = statistics.median(other["step_ms"])
        yield Pair(part, what, "time", "ms", row["ms"], took)
    step = found.get("step")
    for row in kinds.get("training", ()) if step else ():
      what = f"{row['model']} over {row['mesh']}"
      took = statistics.median(step["ms"])
      yield Pair(part, what, "time", "ms", row["ms"], took)
      most = max(step["gb"]["peak_of_each"])
      if most:  # host devices do not say
        yield Pair(part, what, "memory", "GB", row["gb"], most)


def _row(found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
  keys = ("gpus", "routing", "tokens")
  for group in found["groups"]:
    if all(group[k] == row[k] for k in keys):
      for other in group.get("rows", ()):
        if other["name"] == row["name"]:
          return other
  return None


def goals(planned: dict[str, Any], measured: dict[str, Any]) -> Iterator[str]:
  """A line for each goal: what is wanted, planned, measured."""
  for shape, wanted in GOALS.items():
    rows = planned["parts"].get(f"each-{shape}", {}).get("layers", ())
    groups = measured.get(f"each-{shape}", {"groups": ()})["groups"]
    if not rows:
      continue
    gpus = max(row["gpus"] for row in rows)
    for routing in ("balanced", "skewed"):
      said = [
        _best([r for r in rows if (r["gpus"], r["routing"]) == (gpus, routing)]),
        _best(
          row
          for group in groups
          if (group["gpus"], group["routing"]) == (gpus, routing)
          for row in group.get("rows", ())
          if row["devices"] == gpus
        ),
      ]
      yield (
        f"{shape}, {routing}, share of one GPU's rate over {gpus}: wanted {wanted:.2f}"
        f"; planned {said[0]}; measured {said[1]}"
      )
  for part, kinds in planned["parts"].items():
    for row in kinds.get("training", ()):
      step = measured.get(part, {}).get("step")
      took = "not yet"
      if step:
        took = _trained(step, max(step["gb"]["peak_of_each"]))
      wanted = f"wanted {PUBLISHED} TFLOP/s a GPU; " if "qwen3" in part else ""
      yield (
        f"{row['model']} over {row['mesh']}: {wanted}planned "
        f"{_trained(row, row['gb'])}; measured {took}"
      )
  for part, found in measured.items():
    for group in found.get("groups", ()) if part.startswith("liger-") else ():
      rates = {
        row["name"]: row["tflops_per_gpu"]
        for row in group.get("rows", ())
        if row["devices"] == group["gpus"]
      }
      theirs = rates.pop(PEER, None)
      if theirs is None or not rates:
        yield f"{part}: {group.get('missing', {}).get(PEER, 'no figures')}"
        continue
      name = max(rates, key=lambda one: rates[one])
      ours = rates[name]
      yield (
        f"{part}: wanted {TIMES} times {PEER}'s rate; measured {ours / theirs:.2f}, "
        f"{ours:.0f} TFLOP/s by {name} and {theirs:.0f}"
      )
  if saved := measured.get("checkpoint", {}).get("checkpoint"):
    over = [f"{one['to']}: {one['right']}" for one in saved.get("restored", ())]
    yield f"checkpoint from {saved.get('from')}, right on {', '.join(over) or 'none'}"


def _best(rows: Any) -> str:
  found = max(rows, key=lambda row: row.get("share_of_one", 0.0), default=None)
  if found is None:
    return "not yet"
  return f"{found.get('share_of_one', 0.0):.3f} by {found['name']}"


def _trained(row: dict[str, Any], most: float) -> str:
  return (
    f"{row['tflops_per_gpu']:.0f} TFLOP/s a GPU, {row['share_of_ceiling']:.2f} of the "
    f"ceiling, {row['tokens_per_s'] / 1e3:.0f}k tokens/s, {most:.1f} GB"
  )


if __name__ == "__main__":
  run(main)
