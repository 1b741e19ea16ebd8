"""Does a layer whose experts exchange messages compose what they know?

  python -m experiments.composition --out runs/composition

The probe of DAG-MoE's claim (Feng et al. 2026, arXiv 2606.01062) that messages among a
token's experts express more than their weighted sum: functions as tables, of which a
model answers g(x) and f(g(x)) (`experiments.problems`), with one layer and with two.  A
tenth of all (f, g, x) is never trained on.  Arms are those of `experiments.arms`, and
have the same tables, batches and first parameters where they share any; the seeds of an
arm are one vmapped program, and the steps between two evaluations one call.  Programs
so small leave a GPU idle: `--at-once N` trains N arms beside each other.

A line of OUT/composition.jsonl is a seed of an arm at a step: share of right answers by
kind.  Arms that have all their lines are not trained again.  The table has the last
step; `speed`, the mean over all evaluations of the two-step problems of training; and
how much more than --against speed and held-out problems are, over paired seeds with
Student's 95 % interval.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.parser import Parser, ended, run as run_command

FILE = "composition.jsonl"


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.composition",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--out", type=Path, required=True, help="folder of the lines")
  add("--arms", default="sparse,shared=1,shared=2,shared=2-flops,dag=1,dag=2")
  add("--against", default="sparse", help="the arm that the others are compared with")
  add("--layers", default="1,2", help="separated by commas")
  add("--seeds", type=int, default=5, help="0 to this, in one program")
  add("--functions", type=int, default=16)
  add("--values", type=int, default=32)
  add("--width", type=int, default=64, help="of the model; experts half as wide")
  add("--steps", type=int, default=4000, help="of 1024 problems")
  add("--every", type=int, default=200, help="steps between two evaluations")
  add("--rows", type=int, default=64, help="of a batch, 16 problems each")
  add("--learning-rate", type=float, default=2e-3)
  add("--dtype", default="float32", help="of activations, or bfloat16")
  add("--at-once", type=int, default=1, metavar="N", help="arms in as many threads")
  add("--results", type=Path, help="folder of claims; none are written if not given")
  add("--cache", type=Path, default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return ended(
    lambda: _run(arguments),
    stopped="stopped; the same command goes on with the arm that it was at.",
  )


def _run(arguments: argparse.Namespace) -> None:
  extras.check("optax", "train", needed_by="experiments.composition")
  lines = _measured(arguments)
  print("\n".join(table(lines, against=arguments.against)))
  if arguments.results is not None:
    _claim(lines, arguments)


def _runs(arguments: argparse.Namespace) -> dict[tuple[int, str], Any]:
  """(layers, arm) -> its run."""
  import math

  from experiments import arms
  from experiments.config import Data, Optim, Run
  from experiments.vocabulary import VOCAB_SIZE
  from jmoe.config import Attention, BlockConfig, ModelConfig, simple

  names, d_model = arguments.arms.split(","), arguments.width
  if arguments.against not in names:
    raise ValueError(f"--against {arguments.against} is not among --arms {names}.")
  for name in ("seeds", "every", "steps", "at_once"):
    if (value := getattr(arguments, name)) < 1:
      raise ValueError(f"--{name} {value}: give 1 or more.")
  if arguments.steps % arguments.every:
    raise ValueError(
      f"--steps {arguments.steps} is no multiple of --every {arguments.every}."
    )
  if (needed := _task(arguments).tokens) > VOCAB_SIZE:
    raise ValueError(f"--functions and --values need {needed} tokens of {VOCAB_SIZE}.")
  found = {}
  for layers in map(int, arguments.layers.split(",")):
    # Buckets that hold every token: nothing is dropped, and seeds share products.
    sparse = simple(d_model, d_model // 2, num_experts=16, k=4, capacity_factor=4.0)
    block = BlockConfig(Attention(num_heads=4), sparse)
    base = Run(
      name="composition",
      model=ModelConfig(
        VOCAB_SIZE,
        d_model,
        segments=(((block,), layers),),
        remat=False,
        dtype=arguments.dtype,
      ),
      data=Data(max_bytes=1, seq=64, batch=arguments.rows, eval_context=0),
      optim=Optim(
        arguments.learning_rate, warmup_steps=math.ceil(arguments.steps / 20) - 1
      ),
      loss_weights=(("load_balance", 0.01), ("router_z", 0.001)),
      steps=arguments.steps,
      save_every=arguments.steps,
    )
    found |= {(layers, name): arms.arm(base, name) for name in names}
  return found


def _task(arguments: argparse.Namespace) -> Any:
  from experiments.problems import Task

  return Task(arguments.functions, arguments.values, rows=arguments.rows)


def _measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """All lines that the arguments ask for, those done before included."""
  import jax

  from experiments import probe

  runs, task = _runs(arguments), _task(arguments)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  arguments.out.mkdir(parents=True, exist_ok=True)
  path = arguments.out / FILE
  before = path.read_text().splitlines() if path.exists() else []
  lock = threading.Lock()
  names = ("width", "learning_rate", "steps", "every", "dtype")
  same = {name: getattr(arguments, name) for name in names}

  def lines_of(layers: int, name: str) -> list[dict[str, Any]]:
    about = {"layers": layers, "arm": name, **same, "task": dataclasses.asdict(task)}
    kept = [x for x in map(json.loads, before) if about.items() <= x.items()]
    kept = [x for x in kept if x["seed"] < arguments.seeds]
    # Seeds that were trained again, as --seeds grew, have several lines.
    kept = list({(x["seed"], x["step"]): x for x in kept}.values())
    if len(kept) == arguments.seeds * (arguments.steps // arguments.every):
      print(f"layers={layers} {name}: done before", file=sys.stderr)
      return kept
    run = runs[layers, name]
    trained = probe.trained(
      run,
      task,
      seeds=arguments.seeds,
      steps=arguments.steps,
      every=arguments.every,
      label=f"layers={layers} {name}",
    )
    fresh = [about | x for x in trained]
    with lock, path.open("a") as file:
      file.write("".join(json.dumps(x) + "\n" for x in fresh))
    return fresh

  with ThreadPoolExecutor(arguments.at_once) as pool:
    found = list(pool.map(lambda key: lines_of(*key), runs))
  return list(itertools.chain(*found))


def ends(lines: Sequence[Mapping[str, Any]]) -> dict[Any, dict[str, dict[int, float]]]:
  """(layers, arm) -> kind of problem, or "speed" -> seed -> share of right answers."""
  from experiments.problems import KINDS

  last = max(x["step"] for x in lines)
  found: dict[Any, Any] = {}
  for x in lines:
    own = found.setdefault((x["layers"], x["arm"]), {name: {} for name in KINDS})
    own.setdefault("speed", {}).setdefault(x["seed"], []).append(x[KINDS[1]])
    if x["step"] == last:
      for kind in KINDS:
        own[kind][x["seed"]] = x[kind]
  for own in found.values():
    own["speed"] = {seed: sum(each) / len(each) for seed, each in own["speed"].items()}
  return found


def table(lines: Sequence[Mapping[str, Any]], *, against: str) -> list[str]:
  """The lines of the table."""
  from experiments import intervals

  found = ends(lines)
  sizes = {(x["layers"], x["arm"]): x["parameters"] for x in lines}
  names = list(next(iter(found.values())))
  gaps = ("speed", "held out")
  rows = [
    f"{'right answers':<24}{'parameters':>11}" + "".join(f"{n:>10}" for n in names)
  ]
  rows[0] += "".join(f"{f'{name}, more than {against}':>32}" for name in gaps)
  for (layers, arm), own in found.items():
    row = f"{f'{arm}, layers={layers}':<24}{sizes[layers, arm]:>11}"
    for name in names:
      row += f"{intervals.student(list(own[name].values())).mean:>10.3f}"
    for name in gaps if arm != against else ():
      gap = intervals.paired(own[name], found[layers, against][name])
      row += f"{'' if gap is None else intervals.shown(gap):>32}"
    rows.append(row)
  return rows


def _claim(lines: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
  """Appends to FOLDER/composition-LAYERS-KIND.json, as `experiments.series`."""
  from experiments import results
  from experiments.summary import hardware, versions
  from jmoe.use import to_jsonable

  runs = {key: to_jsonable(run) for key, run in _runs(arguments).items()}
  for (layers, arm), own in ends(lines).items():
    of = f"problems of composition answered rightly with layers={layers}"
    for name, values in own.items():
      what = "two steps, mean over training" if name == "speed" else name
      for seed, value in values.items():
        results.append(
          arguments.results / f"composition-{layers}-{name.replace(' ', '_')}.json",
          claim=f"{of}: {what}",
          unit="share",
          against=arguments.against,
          arm=arm,
          seed=seed,
          value=value,
          command=_command(arguments, layers, arm),
          config=dict(runs[layers, arm], task=dataclasses.asdict(_task(arguments))),
          versions=versions(),
          hardware=hardware(),
        )


def _command(arguments: argparse.Namespace, layers: int, arm: str) -> str:
  """The command that measures an arm, and what it is compared with, for any seed."""
  arms = ",".join(dict.fromkeys([arm, arguments.against]))
  words = ["--arms", arms, "--against", arguments.against, "--layers", str(layers)]
  for name in "functions values width steps every rows learning_rate dtype".split():
    words += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
  words += ["--out", "runs/composition"]
  return shlex.join(["python", "-m", "experiments.composition", *words])


if __name__ == "__main__":
  run_command(main)
