"""When modularity emerges: what few groups of hidden units hold, over a run's steps.

  python -m experiments.modularity runs/dense --steps 0,50,200,800

Of every checkpoint that is kept and every dense feed-forward: hidden units are cut into
groups by their keys, and at random; a token takes those whose mean key it likes most
(EMoE, arXiv 2310.10908).  The share of the output that they hold, `<y_k, y>/<y, y>` on
held-out text, is k/N if groups mean nothing.  Step 0 is an untrained model, drawn anew
where no checkpoint of it is there.
A step that was measured is a line of DIR/modularity.jsonl and not measured again.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.parser import Parser, ended, run

FILE = "modularity.jsonl"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.modularity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("workdirs", nargs="+", metavar="DIR", help="of runs; local")
  add("--steps", type=_numbers, help="of checkpoints; all that are there if not given")
  add("--groups", type=int, default=64, help="of hidden units; 64 if not given")
  add("--share", type=float, default=0.25, help="of the groups, for a token")
  add("--rows", type=int, default=8, help="of held-out text; 8 if not given")
  add("--plot", type=Path, metavar="FILE", help="share by step: .svg, .png or .pdf")
  add("--results", type=Path, help="folder of claims; none are written if not given")
  add("--name", default="modularity", help="of the claim; modularity if not given")
  add("--cache", type=Path, metavar="DIR", default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return ended(lambda: _run(arguments, sys.argv[1:] if argv is None else argv))


def _run(arguments: argparse.Namespace, words: Sequence[str]) -> None:
  extras.check_training("experiments.modularity")
  if arguments.plot is not None:
    extras.check("matplotlib", "viz", needed_by="--plot")
  if arguments.results is not None and len(arguments.workdirs) > 1:
    raise ValueError(
      f"--results with {len(arguments.workdirs)} runs: seeds of a claim are those of "
      "partitions; give one DIR, and another --name for each."
    )
  if not 0 < arguments.share <= 1 or arguments.groups < 1 or arguments.rows < 1:
    raise ValueError(
      f"--share {arguments.share} --groups {arguments.groups} --rows "
      f"{arguments.rows}; give a share up to 1, and numbers of at least 1."
    )
  found = {name: _measured(name, arguments) for name in arguments.workdirs}
  for name, records in found.items():
    print("\n".join([f"{name}:", *lines(records)]))
  if arguments.plot is not None:
    _draw(found, arguments.plot)
  if arguments.results is not None:
    for name, records in found.items():
      claim(Path(name), records, arguments, words)


def _measured(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """A record for each step and dense feed-forward, done before or now."""
  import jax

  from experiments import metrics, workdir
  from experiments.errors import BadData
  from experiments.operations._source import Source

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  folder = workdir.opened(name, "DIR")
  if not workdir.is_local(folder):
    raise BadData(f"{folder} is not local; bring it here first.")
  place = folder / "checkpoints"
  kept = (
    [int(p.name) for p in place.iterdir() if p.name.isdigit()] if place.exists() else []
  )
  steps = sorted({0, *kept}) if arguments.steps is None else arguments.steps
  settings = {n: getattr(arguments, n) for n in ("groups", "share", "rows")}
  path = folder / FILE
  measured = metrics.kept(path, sys.maxsize)
  for step in dict.fromkeys(steps):
    if any(_is(line, step, settings) for line in measured):
      continue
    drawn = step == 0 and 0 not in kept
    source = Source(folder, arguments.cache, None if drawn else step)
    new = _one(source, drawn, arguments)
    if not new:
      raise BadData(f"DIR {folder}: the model has no dense feed-forward to look at.")
    measured.append({"step": step, "settings": settings, "records": new})
    metrics.Lines(path, measured).close()
    print(f"{folder}: step {step}", file=sys.stderr)
  return [
    {"step": line["step"], **record}
    for line in measured
    if any(_is(line, step, settings) for step in steps)
    for record in line["records"]
  ]


def _is(line: Mapping[str, Any], step: int, settings: Mapping[str, Any]) -> bool:
  """Whether it has all of a step; lines that have one record each do not say so."""
  same = line["step"] == step and line.get("settings") == settings
  return same and "records" in line


def _one(
  source: Any, drawn: bool, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
  from flax import nnx

  from experiments import opening
  from experiments.emoe.held import SEEDS, compared
  from experiments.errors import BadData
  from experiments.operations._source import sample_of
  from jmoe import surgery
  from jmoe.config import Dense
  from jmoe.models import Decoder
  from jmoe.surgery import dense

  model = source.model
  if drawn:
    untrained = Decoder(source.run.model, rngs=nnx.Rngs(source.run.seed))
    model = surgery.model_of(untrained)
  batch = next(iter(opening.held_out_batches(source.run, source.encoded)))
  given = surgery.fed(model, sample_of(batch, arguments.rows))
  records, left_out = [], []
  for depth, (block, x_TD) in enumerate(zip(surgery.blocks(model), given, strict=True)):
    ff = block.config.ff
    if not isinstance(ff, Dense):
      continue
    if ff.d_ff % arguments.groups:
      left_out.append(ff.d_ff)
      continue
    for seed in SEEDS:
      feed = dense.of_block(block), x_TD, ff.activation
      found = compared(*feed, arguments.groups, [arguments.share], seed)
      records += [{"layer": depth, **record} for record in found]
  if left_out and not records:
    raise BadData(
      f"--groups {arguments.groups} does not divide d_ff={left_out[0]}; give a divisor."
    )
  if left_out:
    print(f"without layers of d_ff={left_out[0]}", file=sys.stderr)
  return records


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Shares by step and layer: by keys, at random, and their difference."""
  cells = by_step(records)
  layers = sorted({record["layer"] for record in records})
  head = "".join(f"{f'layer {layer}':>24}" for layer in layers)
  said = [f"{'step':>8}{head}", f"{'':>8}" + f"{'keys - random':>24}" * len(layers)]
  for step in sorted({record["step"] for record in records}):
    row = ""
    for layer in layers:
      keys, chance = (cells[layer, part][step] for part in ("keys", "random"))
      row += f"{f'{keys:.3f} - {chance:.3f} = {keys - chance:.3f}':>24}"
    said.append(f"{step:>8}{row}")
  return said


def by_step(records: Sequence[Mapping[str, Any]]) -> dict[tuple, dict[int, float]]:
  """(layer, partition) -> step -> share, the mean over seeds."""
  found: dict[tuple, dict[int, list[float]]] = {}
  for r in records:
    by_step = found.setdefault((r["layer"], r["partition"]), {})
    share = math.nan if r["share"] is None else r["share"]  # JSON has no NaN
    by_step.setdefault(r["step"], []).append(share)
  return {
    at: {step: sum(shares) / len(shares) for step, shares in by_step.items()}
    for at, by_step in found.items()
  }


def claim(
  folder: Path,
  records: Sequence[Mapping[str, Any]],
  arguments: argparse.Namespace,
  words: Sequence[str],
) -> None:
  """Appends to RESULTS/NAME-share.json: each step's shares, by seed of the partition.

  Raises:
    BadData: the file holds something else.
  """
  from experiments import results, summary

  config = json.loads((folder / "config.json").read_text())
  settings = {n: getattr(arguments, n) for n in ("groups", "share", "rows")}
  cells: dict[tuple[int, str, int], list[float]] = {}
  for r in records:
    cells.setdefault((r["step"], r["partition"], r["seed"]), []).append(r["share"])
  for (step, partition, seed), shares in cells.items():
    if None in shares:  # an output of zeros has no shares
      continue
    results.append(
      arguments.results / f"{arguments.name}-share.json",
      claim=f"share of a feed-forward's output that {100 * arguments.share:g} % of "
      f"{arguments.groups} groups hold, chosen by mean keys, mean over layers; seeds "
      "of partitions",
      unit="share",
      arm=f"{config['name']}, step {step}, {partition}",
      seed=seed,
      value=sum(shares) / len(shares),
      command=shlex.join(["python", "-m", "experiments.modularity", *words]),
      config={"run": config, **settings},
      versions=summary.versions(),
      hardware=summary.hardware(),
    )


def _draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.add_subplot()
  for name, records in found.items():
    cells = by_step(records)
    for layer in sorted({layer for layer, _ in cells}):
      keys, chance = cells[layer, "keys"], cells[layer, "random"]
      steps = sorted(keys)
      gaps = [keys[step] - chance[step] for step in steps]
      axes.plot(steps, gaps, marker="o", label=f"{name}, layer {layer}")
  axes.set_xlabel("step")
  axes.set_ylabel("share held by clustered groups, less random ones")
  axes.legend(fontsize="small")
  figure.savefig(path)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
  run(main)
