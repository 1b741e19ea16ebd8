"""What the records say: a rate for each arm, accuracies, paired differences, claims.

An arm's rate is the one with the highest mean over seeds on the texts that choose; no
test text is read for it.  Differences are over equal seeds, which draw equal texts,
heads and orders in all arms.
"""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import intervals, results, workdir
from experiments.emoe.jobs import FILE, Job
from experiments.errors import BadData

DOMAINS = ("film", "tweets", "amazon", "editorials")


class Row(NamedTuple):
  """An arm in one form, at its rate."""

  label: str
  job: Job
  rate: float
  by_seed: dict[int, dict[str, float]]  # seed -> domain -> accuracy
  about: Mapping[str, Any]  # a record of it


def rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Every arm as it was trained, and in its other form; arms that are not whole wait.

  Raises:
    BadData: arms of one tuning had different settings, or none is whole.
  """
  groups: dict[tuple[Job, str], dict[float, dict[int, Mapping[str, Any]]]] = {}
  for record in records:  # of equal ones the last counts
    job = Job(*(record[name] for name in Job._fields))
    plan = json.dumps(record["plan"], sort_keys=True)
    rates = groups.setdefault((job, plan), {})
    rates.setdefault(record["rate"], {})[record["seed"]] = record
  found: list[Row] = []
  plans: dict[str, Any] = {}  # by tuning
  for (job, text), rates in groups.items():
    plan = json.loads(text)
    models = sum(map(len, rates.values()))
    if models < len(plan["rates"]) * len(plan["seeds"]):
      continue
    if apart := workdir.differences(plans.setdefault(job.tuning, plan), plan):
      raise BadData(
        f"{FILE} has {job.tuning} tuning under different settings ({job.arm}: "
        f"{workdir.listed(apart)}); keep those of one in it."
      )
    rate = max(rates, key=lambda r: _mean(rates[r].values(), "choose"))
    seeds = rates[rate]
    about = next(iter(seeds.values()))
    forms = {"accuracy": job.arm, "accuracy_as_dense": f"{job.arm} to dense"}
    forms["accuracy_as_groups"] = f"{job.arm} to groups"
    for name, label in forms.items():
      if name in about:
        own = {seed: dict(record[name]) for seed, record in seeds.items()}
        found.append(Row(label, job, rate, own, about))
  if not found:
    raise BadData(f"{FILE} has all models of no arm; go on with `run`.")
  return found


def _mean(records: Any, domain: str) -> float:
  values = [record["accuracy"][domain] for record in records]
  return sum(values) / len(values)


def out_of_domain(accuracies: Mapping[str, float], task: str) -> float:
  """The mean over the domains that trained nothing."""
  others = [d for d in DOMAINS if d != "film" and (task == "film" or d != "amazon")]
  return sum(accuracies[d] for d in others) / len(others)


def lines(found: Sequence[Row], against: str = "dense") -> list[str]:
  """For a terminal: by task and tuning, a line an arm."""
  said = []
  for task, tuning in dict.fromkeys((r.job.task, r.job.tuning) for r in found):
    own = [r for r in found if (r.job.task, r.job.tuning) == (task, tuning)]
    base = next((r for r in own if r.label == against), None)
    said.append(f"{task}, {tuning} tuning: accuracy in %, less {against} [95 %] (+/-)")
    domains = (*DOMAINS, "others")
    head = "".join(f"{domain:>38}" for domain in domains)
    said.append(f"{'arm':<18}{'N':>4}{'k':>4}{'rate':>8}{head}")
    for row in own:
      cells = "".join(f"{_cell(row, base, domain):>38}" for domain in domains)
      size = f"{row.job.groups or '':>4}{row.job.k or '':>4}{row.rate:>8.0e}"
      said.append(f"{row.label:<18}{size}{cells}")
    said.append("")
  return said


def values(row: Row, domain: str) -> dict[int, float]:
  """By seed, in per cent."""
  return {
    seed: 100
    * (out_of_domain(each, row.job.task) if domain == "others" else each[domain])
    for seed, each in row.by_seed.items()
  }


def _cell(row: Row, base: Row | None, domain: str) -> str:
  own = values(row, domain)
  mean = sum(own.values()) / len(own)
  if base is None or base is row:
    return f"{mean:.2f}"
  other = values(base, domain)
  gap = intervals.paired(own, other)
  gaps = [own[seed] - other[seed] for seed in own if seed in other]
  if gap is None:
    return f"{mean:.2f}"
  signs = f"({sum(g > 0 for g in gaps)}/{sum(g < 0 for g in gaps)})"
  return f"{mean:.2f} {intervals.shown(gap, 2)} {signs}"


def claim(found: Sequence[Row], folder: Path, name: str, command: str) -> None:
  """Appends to FOLDER/NAME-TASK-TUNING-DOMAIN.json, as `experiments.series`.

  Raises:
    BadData: a file holds something else.
  """
  for row in found:
    job = row.job
    # Of the film task four domains and their mean; of two tasks those that trained.
    domains = (*DOMAINS, "others") if job.task == "film" else ("film", "amazon")
    arm = row.label if not job.groups else f"{row.label}, {job.k} of {job.groups}"
    for domain in domains:
      what = "tweets, Amazon and editorials" if domain == "others" else domain
      for seed, value in values(row, domain).items():
        results.append(
          folder / f"{name}-{job.task}-{job.tuning}-{domain}.json",
          claim=f"accuracy on {what}, MiniLM, {job.tuning} tuning on {_trains(job)}",
          unit="% of texts",
          against="dense",
          arm=arm,
          seed=seed,
          value=value,
          command=command,
          config={**job._asdict(), "rate": row.rate, **_settings(row)},
          versions=row.about["versions"],
          hardware=row.about["hardware"],
        )


def _trains(job: Job) -> str:
  if job.task == "film":
    return "film snippets"
  return "film snippets and Amazon sentences with inverted labels"


def _settings(row: Row) -> dict[str, Any]:
  return {name: x for name, x in row.about["plan"].items() if name != "seeds"}
