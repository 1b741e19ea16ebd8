"""What is to do, and what is done: jobs, their common settings, their records.

A job is an arm of a task under a tuning: all rates and seeds at once.  Each model is a
line of results.jsonl: accuracies, or bits per byte, by domain as it was trained, and in
the other form.
"""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = "results.jsonl"
TASKS = {"film": ("film",), "conflict": ("film", "amazon")}  # the domains that train
_CUT = [64, 16]  # of encoders' dense records that do not say theirs


class Job(NamedTuple):
  """One program's worth of models."""

  task: str
  tuning: str
  arm: str
  groups: int  # 0 of the dense arm
  k: int


class Plan(NamedTuple):
  """What is common to all jobs."""

  seeds: Sequence[int]
  rates: dict[str, Sequence[float]]  # by tuning
  groups: int
  k: int
  layers: tuple[int, ...]
  examples: int
  batch: int
  epochs: int
  precision: str
  few: int | None = None  # texts that test, of each domain; None: all
  eval_batch: int = 256
  source: Mapping[str, Any] | None = None  # model and text, if they are not always same


def jobs(
  plan: Plan, tasks: Sequence[str], tunings: Sequence[str], names: Sequence[str],
  grid: Sequence[tuple[int, int]],
) -> Iterator[Job]:  # fmt: skip
  """The jobs in order; those that matter most come first."""
  usual = (plan.groups, plan.k)
  for task in tasks:
    for tuning in tunings:
      for name in names:
        # Keys that are not trained are followed by means that stay.
        if tuning == "lora" and name == "frozen":
          continue
        # Where labels conflict three arms say it; the controls are of the first task.
        if task == "conflict" and name not in ("dense", "emoe", "random"):
          continue
        yield Job(task, tuning, name, *((0, 0) if name == "dense" else usual))
  for tuning in tunings[:1]:
    for groups, k in grid:
      if (groups, k) != usual:
        yield Job(tasks[0], tuning, "emoe", groups, k)


def trains(task: str) -> tuple[str, ...]:
  """The domains that train in a task; one of text to predict is that of its name."""
  return TASKS.get(task, (task,))


def told(plan: Plan, job: Job) -> dict[str, Any]:
  """What must be the same for records to belong together."""
  more: dict[str, Any] = {}
  if plan.source is not None:
    more["source"] = dict(plan.source)
  if not job.groups:  # dense models are asked in groups too, once they are trained
    more["cut"] = [plan.groups, plan.k]
  return more | {
    "layers": list(plan.layers),
    "examples": plan.examples,
    "batch": plan.batch,
    "epochs": plan.epochs,
    "precision": plan.precision,
    "few": plan.few,
    "rates": list(plan.rates[job.tuning]),
    "seeds": list(plan.seeds),
  }


def done(path: Path, plan: Plan) -> set[Job]:
  """Jobs of which all models are there; records of other settings are not counted."""
  if not path.exists():
    return set()
  models: dict[Job, set[tuple[float, int]]] = {}  # a killed job's may be there twice
  for record in records(path):
    job = Job(*(record[name] for name in Job._fields))
    own = record["plan"]
    if not job.groups and "source" not in own:
      own = {"cut": _CUT} | own
    if own == json.loads(json.dumps(told(plan, job))):
      models.setdefault(job, set()).add((record["rate"], record["seed"]))
  return {
    job
    for job, own in models.items()
    if len(own) >= len(plan.seeds) * len(plan.rates[job.tuning])
  }


def records(path: Path) -> list[dict[str, Any]]:
  """All whole lines; one that a kill cut off is left out."""
  found = []
  for line in path.read_text().splitlines():
    try:
      found.append(json.loads(line))
    except ValueError:
      continue
  return found
