"""Trains several seeds of several arms and keeps the outcome as results.

  python -m experiments.series --config small --arms sparse,dense --against dense \
      --seeds 0,1,2 --out runs/series

The seeds of an arm are one program: their states are stacked and the step is vmapped;
`--together N` for no more than N of them, where they do not fit.  `--ahead N` compiles
all arms before the first is trained, N at a time.  Seed n draws its
parameters and the order of its data from n, so that all arms see the same batches.
Each seed leaves a folder OUT/ARM/seed-n like that of a single run, with checkpoints;
what is finished there is not trained again, what was stopped goes on where it was, so a
series may take several sittings.  `experiments.arms` lists arms.
With `--start-from DIR`, the folder of another series, each seed of an arm starts with
the model that this seed of this arm ended with there: to fine-tune all of them on other
text (`--set data.corpus=...`).

Claims are appended to RESULTS/NAME-*.json: bits per byte, compute to equal loss (from
the curves, and where there are arms `steps=F` from runs planned to be shorter), time of
a step, memory, drops and dead experts.

Exit codes: 0 done, 1 a loss was no number too often, 2 bad input, 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import configs
from experiments.errors import Stopped
from experiments.parser import Parser, ended, run

_NOTHING_SAVED = (
  "stopped, and nothing was saved; the same command begins this arm anew."
)


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
  add("--together", type=int, default=0, metavar="N", help="seeds a program; 0: all")
  add("--ahead", type=int, default=0, metavar="N", help="arms compiled at a time")
  add("--out", required=True, help="folder of the series")
  add("--start-from", metavar="DIR", help="folder of the series whose models go on")
  add(
    "--keep-every",
    type=int,
    metavar="N",
    help="keep checkpoints of steps that are multiples of N; else the last two alone",
  )
  add("--no-checkpoints", action="store_true", help="what is stopped begins anew")
  add("--set", action="append", default=[], metavar="PATH=VALUE")
  add("--results", type=Path, help="folder of claims; default: none are written")
  add("--name", help="of the claims; default: the config's")
  add("--cache", type=Path, default=Path.home() / ".cache" / "jmoe")
  arguments = parser.parse_args(argv)
  return ended(
    lambda: _run(_arms(arguments), arguments, argv or sys.argv[1:]),
    bad=(ValueError, TypeError, OSError),
    stopped="stopped; the same command goes on from the last checkpoints.",
  )


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
  if arguments.keep_every is not None and arguments.keep_every < 1:
    raise ValueError(f"--keep-every {arguments.keep_every}: give steps, 1 or more.")
  if arguments.together < 0:
    raise ValueError(f"--together {arguments.together}: give a number of seeds, or 0.")
  if arguments.ahead < 0:
    raise ValueError(f"--ahead {arguments.ahead}: give a number of arms, or 0.")
  if twice := [text for text in seeds if seeds.count(text) > 1]:
    raise ValueError(f"--seeds {arguments.seeds}: {twice[0]} is given twice.")
  if arguments.start_from and base.start_from:
    raise ValueError(
      f"--start-from {arguments.start_from} with start_from={base.start_from}; give "
      "one of them."
    )
  out = workdir.opened(arguments.out, "--out")
  if not workdir.is_local(out):
    raise ValueError(f"--out {out} is not local; give a local folder.")
  found = []
  for name in arguments.arms.split(","):
    run = arms.arm(base, name)
    if base.start_from and run.model != base.model:
      raise ValueError(
        f"--arms {name}: another model cannot start from {base.start_from}; leave out "
        "the arm, or start_from."
      )
    runs = [
      dataclasses.replace(run, seed=seed, data=dataclasses.replace(run.data, seed=seed))
      for seed in seeds
    ]
    places = [f"{name.replace('=', '-')}/seed-{seed}" for seed in seeds]
    if arguments.start_from:
      start = str(arguments.start_from).rstrip("/")
      runs = [
        dataclasses.replace(each, start_from=f"{start}/{place}")
        for each, place in zip(runs, places, strict=True)
      ]
    folders = [out / place for place in places]
    for each, folder in zip(runs, folders, strict=True):
      workdir.check(each, folder)
    found.append(Arm(name, runs, folders))
  against = arguments.against or found[-1].name
  if against not in [arm.name for arm in found]:
    raise ValueError(f"--against {against} is not among --arms {arguments.arms}.")
  return found


def _run(found: list[Arm], arguments: argparse.Namespace, argv: list[str]) -> None:
  import jax

  from experiments import claims, job, opening, together
  from experiments.signals import Stop

  jax.config.update("jax_compilation_cache_dir", str(arguments.cache / "compiled"))
  job.check([(run, folder) for a in found for run, folder in zip(a.runs, a.folders)])
  first = found[0].runs[0]
  texts, encoded = job.loaded(first, arguments.cache)
  _same_text(found, texts.digest)
  held_out = list(opening.held_out_batches(first, encoded))
  reading = together.Reading(texts, encoded, held_out)
  command = ["python", "-m", "experiments.series", *argv]
  missing = _missing(found, arguments.together)
  with Stop() as stop:
    ahead = _ahead(missing, reading, arguments.ahead)
    for runs, folders in missing:
      try:
        together.finish(
          runs,
          folders,
          reading,
          command=command,
          stop=stop,
          saved=not arguments.no_checkpoints,
          ahead=ahead,
          keep_every=arguments.keep_every,
        )
      except Stopped as stopped:
        if arguments.no_checkpoints:
          stopped.args = (_NOTHING_SAVED,)
        raise
  against = arguments.against or found[-1].name
  measured = claims.measured(found, against)
  claims.show(measured)
  if arguments.results is not None:
    claims.append(
      measured,
      found,
      against=against,
      folder=arguments.results,
      name=arguments.name or arguments.config,
      command=functools.partial(_command, arguments, against),
    )


def _missing(found: list[Arm], together: int) -> list[tuple[Any, Any]]:
  """(runs, folders) of what is not finished, `together` at a time, or 0: all."""
  parts = []
  for arm in found:
    missing = [
      (run, folder)
      for run, folder in zip(arm.runs, arm.folders, strict=True)
      if not _finished(folder)
    ]
    if not missing:
      print(f"{arm.name}: finished before", file=sys.stderr)
    size = together or len(missing)
    for begin in range(0, len(missing), size or 1):
      parts.append(tuple(zip(*missing[begin : begin + size], strict=True)))
  return parts


def _ahead(missing: list[tuple[Any, Any]], reading: Any, workers: int) -> Any:
  """The steps of what is missing, compiled `workers` at a time; 0: none."""
  from experiments import compiling, together

  if not workers:
    return compiling.Ahead()
  print(f"compiling {len(missing)} programs, {workers} at a time", file=sys.stderr)
  wanted = [
    compiling.Wanted(runs[0], together.program_of(runs[0], reading), len(runs))
    for runs, _ in missing
  ]
  return compiling.Ahead(wanted, workers)


def _command(arguments: argparse.Namespace, against: str, arm: str) -> str:
  """The command that measures an arm and what it is compared with.

  `sparse` is also compared with its shorter runs, for planned compute.
  """
  shorter = [a for a in arguments.arms.split(",") if a.startswith("steps=")]
  names = [arm, *(shorter if arm == "sparse" else []), against]
  arms = ",".join(dict.fromkeys(names))
  words = ["python", "-m", "experiments.series", "--config", arguments.config]
  words += ["--arms", arms, "--against", against]
  words += [w for s in arguments.set for w in ("--set", s)]
  if arguments.name:
    words += ["--name", arguments.name]
  if arguments.together:
    words += ["--together", str(arguments.together)]
  if arguments.start_from:
    words += ["--start-from", arguments.start_from]
  return shlex.join([*words, "--out", f"runs/{arguments.name or arguments.config}"])


def _finished(folder: Any) -> bool:
  return bool(_summary(folder).get("finished"))


def _summary(folder: Any) -> dict[str, Any]:
  """Of a run that has one; otherwise empty."""
  from experiments.errors import BadData

  path = folder / "summary.json"
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
    if not isinstance(found["finished"], bool):
      raise TypeError
  except (ValueError, KeyError, TypeError):
    raise BadData(f"{path} is not the summary of a run; remove it.") from None
  return found


def _same_text(found: list[Arm], digest: str) -> None:
  """Raises if a finished run read another text than the others will."""
  from experiments.errors import BadData

  for folder in (folder for arm in found for folder in arm.folders):
    summary = _summary(folder)
    if summary.get("finished") and summary["data"]["digest"] != digest:
      raise BadData(
        f"{folder} was trained on another text (sha256 "
        f"{summary['data']['digest'][:16]}, not {digest[:16]}); give another --out, or "
        "the text of then."
      )


if __name__ == "__main__":
  run(main)
