"""Trains several seeds of several arms and keeps the outcome as results.

  python -m experiments.series --config small --arms sparse,dense --against dense \
      --seeds 0,1,2 --out runs/series

The seeds of an arm are one program: their states are stacked and the step is vmapped.
Seed n draws its parameters and the order of its data from n, so that all arms see the
same batches.  Each seed leaves a folder OUT/ARM/seed-n like that of a single run, for
`experiments.report` and `experiments.compare`; an arm that is finished there is not
trained again, so a series may take several sittings.  `experiments.arms` lists arms.

Claims are appended to RESULTS/NAME-*.json: bits per byte, compute to equal loss, time
of a step, memory, drops and dead experts.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import configs, extras
from experiments.parser import Parser


class Arm(NamedTuple):
  """One arm and the runs of its seeds."""

  name: str
  runs: Sequence[Any]
  folders: Sequence[Any]


def main(argv: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  parser = Parser(
    prog="python -m experiments.series",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, choices=configs.names(), metavar="NAME")
  add("--arms", required=True, help="separated by commas")
  add("--against", help="the arm that the others are compared with; default: the last")
  add("--seeds", default="0,1,2", help="separated by commas")
  add("--out", required=True, help="folder of the series")
  add("--set", action="append", default=[], metavar="PATH=VALUE")
  add("--results", type=Path, help="folder of claims; default: none are written")
  add("--name", help="of the claims; default: the config's")
  add("--cache", type=Path, default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  try:
    found = _arms(arguments)
    _run(found, arguments, argv or sys.argv[1:])
  except (ValueError, TypeError, OSError, extras.MissingExtra) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("\nstopped; finished arms are kept.", file=sys.stderr)
    return 130
  return 0


def _arms(arguments: argparse.Namespace) -> list[Arm]:
  """All runs, checked."""
  from experiments import arms, settings, workdir

  base = settings.with_settings(configs.load(arguments.config), arguments.set)
  try:
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
  except ValueError:
    raise ValueError(
      f"--seeds {arguments.seeds}: give integers separated by commas, as in 0,1,2."
    ) from None
  out = workdir.opened(arguments.out)
  if not workdir.is_local(out):
    raise ValueError(f"--out {out} is not local; give a local folder.")
  found = []
  for name in arguments.arms.split(","):
    run = arms.arm(base, name)
    runs = [
      dataclasses.replace(run, seed=seed, data=dataclasses.replace(run.data, seed=seed))
      for seed in seeds
    ]
    folders = [out / name.replace("=", "-") / f"seed-{seed}" for seed in seeds]
    for each, folder in zip(runs, folders, strict=True):
      workdir.check(each, folder)
    found.append(Arm(name, runs, folders))
  against = arguments.against or found[-1].name
  if against not in [arm.name for arm in found]:
    raise ValueError(f"--against {against} is not among --arms {arguments.arms}.")
  return found


def _run(found: list[Arm], arguments: argparse.Namespace, argv: list[str]) -> None:
  import jax

  from experiments import claims, job

  jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  job.check([(run, folder) for a in found for run, folder in zip(a.runs, a.folders)])
  texts, encoded = job.loaded(found[0].runs[0], arguments.cache)
  for arm in found:
    if all(_finished(folder) for folder in arm.folders):
      print(f"{arm.name}: finished before", file=sys.stderr)
      continue
    _trained(arm, texts, encoded, ["python", "-m", "experiments.series", *argv])
  against = arguments.against or found[-1].name
  measured = claims.measured(found, against)
  claims.show(measured)
  if arguments.results is not None:
    words = ["python", "-m", "experiments.series", "--config", arguments.config]
    words += ["--against", against, *(w for s in arguments.set for w in ("--set", s))]
    claims.append(
      measured,
      found,
      against=against,
      folder=arguments.results,
      name=arguments.name or arguments.config,
      command=shlex.join(words),
    )


def _finished(folder: Any) -> bool:
  path = folder / "summary.json"
  return path.exists() and json.loads(path.read_text())["finished"]


def _trained(arm: Arm, texts: Any, encoded: Any, command: list[str]) -> None:
  """Trains and evaluates all seeds of an arm; writes their folders."""
  import jax
  import numpy as np
  from tqdm import tqdm

  from experiments import data, metrics, program, seeds, workdir
  from experiments.alarms import Alarms
  from experiments.routing import layers
  from experiments.sitting import evaluated
  from experiments.summary import summary

  first = arm.runs[0]
  made = [
    program.program(
      run,
      byte_lengths=encoded.vocabulary.byte_lengths,
      num_domains=len(texts.domains),
    )
    for run in arm.runs
  ]
  state = seeds.stack([one.init() for one in made])
  windows = data.Windows(encoded.train, seq=first.data.seq)
  batches = [
    data.batches(
      windows,
      batch=first.data.batch,
      seq=first.data.seq,
      seed=run.data.seed,
      num_workers=run.data.num_workers,
      temperature=run.data.temperature,
    )
    for run in arm.runs
  ]
  lines, watched = [], []
  for run, folder in zip(arm.runs, arm.folders, strict=True):
    workdir.claim(run, folder)
    workdir.write_json(folder / "manifest.json", texts.manifest)
    encoded.vocabulary.save(folder / "vocabulary")
    lines.append(metrics.Lines(folder / "metrics.jsonl", []))
    watched.append(metrics.Lines(folder / "routing.jsonl", []))
  alarms = [Alarms() for _ in arm.runs]
  skipped, speeds, times = [0] * len(arm.runs), [], []
  bar = tqdm(total=first.steps, desc=arm.name, unit="step", dynamic_ncols=True)
  if not bar.fp.isatty():
    bar.mininterval = bar.maxinterval = 10.0
  tokens = first.data.batch * first.data.seq

  def report(step: int, found: Any) -> None:
    values, routing = found
    values = jax.device_get(values)
    times.append(time.perf_counter())
    if len(times) > 20:
      speeds.append(20 * tokens / (times[-1] - times[-21]))
    for n in range(len(arm.runs)):
      own = {name: float(value[n]) for name, value in values.items()}
      own |= {"tokens_per_second": speeds[-1]} if speeds else {}
      lines[n].add({"step": step} | own)
      skipped[n] += bool(own["skipped"])
      alarms[n].metrics(step, own)
      if routing and (step % first.watch_every == 0 or step == 1):
        one = layers(first.model, jax.tree.map(lambda x, n=n: x[n], routing))
        watched[n].add({"step": step, "layers": one})
        alarms[n].routing(step, one)
    bar.set_postfix_str(
      ", ".join(f"{x:.3f}" for x in values["bits_per_byte"]) + " bits/byte",
      refresh=False,
    )
    bar.update()

  joined = [next(b) for b in batches]
  stacked = {n: np.stack([b[n] for b in joined]) for n in joined[0]}
  step_fn = seeds.jitted(made[0].train_step).lower(state, stacked).compile()
  memory = step_fn.memory_analysis()
  begin, waiting = time.perf_counter(), None
  for step in range(1, first.steps + 1):
    if step > 1:
      joined = [next(b) for b in batches]
      stacked = {n: np.stack([b[n] for b in joined]) for n in joined[0]}
    state, *found = step_fn(state, stacked)
    if waiting is not None:
      report(*waiting)
    waiting = (step, found)
  assert waiting is not None
  report(*waiting)
  bar.close()
  seconds = time.perf_counter() - begin
  eval_step = jax.jit(made[0].eval_step)
  for n, one in enumerate(seeds.unstack(state)):
    run, folder = arm.runs[n], arm.folders[n]
    lines[n].close()
    watched[n].close()
    bits = evaluated(run, folder, one, eval_step, texts, encoded).bits
    body = summary(
      run,
      step=first.steps,
      seconds=seconds / len(arm.runs),
      speeds=speeds,
      skipped=skipped[n],
      alarms=alarms[n].counts,
      data={"corpus": run.data.corpus, "digest": texts.digest},
      command=command,
      bits=bits,
    )
    body["memory"] = {
      "seeds_at_once": len(arm.runs),
      "arguments": memory.argument_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
    }
    body["seeds_at_once"] = len(arm.runs)
    workdir.write_json(folder / "summary.json", body)


if __name__ == "__main__":
  sys.exit(main())
