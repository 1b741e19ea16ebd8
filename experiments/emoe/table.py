"""What the records say: a rate for each arm, means, paired differences, claims.

An arm's rate is the one with the best mean over seeds on the texts that choose; no
test text is read for it.  Differences are over equal seeds, which draw equal texts,
heads and orders in all arms.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import intervals, results, workdir
from experiments.emoe.jobs import FILE, Job, trains
from experiments.errors import BadData

_SHOWN = 5  # domains; of more, those that train, and the mean of the others


class Measure(NamedTuple):
  """What was measured, as it is shown."""

  head: str
  unit: str
  factor: float
  digits: int
  best: Callable[..., Any]


MEASURES = {
  "accuracy": Measure("accuracy in %", "% of texts", 100, 2, max),
  "bits": Measure("bits per byte", "bits per byte", 1, 4, min),
}


class Row(NamedTuple):
  """An arm in one form, at its rate."""

  label: str
  job: Job
  rate: float
  measure: Measure
  by_seed: dict[int, dict[str, float]]  # seed -> domain -> what was measured
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
  plans: dict[Any, Any] = {}  # by tuning, and by job
  for (job, text), rates in groups.items():
    plan = json.loads(text)
    models = sum(map(len, rates.values()))
    if models < len(plan["rates"]) * len(plan["seeds"]):
      continue
    shared = {n: x for n, x in plan.items() if n != "cut"}  # which dense arms have
    for key, own in ((job.tuning, shared), (job, plan)):
      if apart := workdir.differences(plans.setdefault(key, own), own):
        raise BadData(
          f"{FILE} has {job.tuning} tuning under different settings ({job.arm}: "
          f"{workdir.listed(apart)}); keep those of one in it."
        )
    some = next(iter(next(iter(rates.values())).values()))
    what = next(name for name in MEASURES if name in some)
    means = {r: _mean(rates[r], what) for r in rates}
    means = {r: x for r, x in means.items() if math.isfinite(x)} or means
    rate = MEASURES[what].best(means, key=means.__getitem__)
    seeds = rates[rate]
    about = next(iter(seeds.values()))
    for form, label in _FORMS.items():
      if what + form in about:
        own = {seed: dict(record[what + form]) for seed, record in seeds.items()}
        label = label.format(job.arm)
        found.append(Row(label, job, rate, MEASURES[what], own, about))
  if not found:
    raise BadData(f"{FILE} has all models of no arm; go on with `run`.")
  return found


_FORMS = {
  "": "{}",
  "_as_dense": "{} to dense",
  "_as_groups": "{} to groups",
  "_before": "untuned",
}


def _mean(seeds: Mapping[int, Mapping[str, Any]], what: str) -> float:
  values = [record[what]["choose"] for record in seeds.values()]
  return sum(values) / len(values)


def domains(row: Row) -> list[str]:
  """Those of the tests."""
  return [d for d in next(iter(row.by_seed.values())) if d != "choose"]


def out_of_domain(measured: Mapping[str, float], task: str) -> float:
  """The mean over the domains that trained nothing."""
  own = ("choose", *trains(task))
  others = [value for domain, value in measured.items() if domain not in own]
  return sum(others) / len(others)


def lines(found: Sequence[Row], against: str = "dense") -> list[str]:
  """For a terminal: by task and tuning, a line an arm."""
  said = []
  for task, tuning in dict.fromkeys((r.job.task, r.job.tuning) for r in found):
    own = [r for r in found if (r.job.task, r.job.tuning) == (task, tuning)]
    base = next((r for r in own if r.label == against), None)
    what = own[0].measure.head
    said.append(f"{task}, {tuning} tuning: {what}, less {against} [95 %] (+/-)")
    shown = [*domains(own[0]), "others"]
    shown = shown if len(shown) <= _SHOWN else [*trains(task), "others"]
    width = 34 + 2 * own[0].measure.digits
    head = "".join(f"{domain:>{width}}" for domain in shown)
    said.append(f"{'arm':<18}{'N':>4}{'k':>4}{'rate':>8}{head}")
    for row in own:
      cells = "".join(f"{_cell(row, base, domain):>{width}}" for domain in shown)
      size = f"{row.job.groups or '':>4}{row.job.k or '':>4}{row.rate:>8.0e}"
      said.append(f"{row.label:<18}{size}{cells}")
    said.append("")
  return said


def values(row: Row, domain: str) -> dict[int, float]:
  """By seed, in the unit of its measure."""
  return {
    seed: row.measure.factor
    * (out_of_domain(each, row.job.task) if domain == "others" else each[domain])
    for seed, each in row.by_seed.items()
  }


def _cell(row: Row, base: Row | None, domain: str) -> str:
  own = values(row, domain)
  digits = row.measure.digits
  mean = f"{sum(own.values()) / len(own):.{digits}f}"
  if base is None or base is row:
    return mean
  other = values(base, domain)
  gap = intervals.paired(own, other)
  gaps = [own[seed] - other[seed] for seed in own if seed in other]
  if gap is None:
    return mean
  signs = f"({sum(g > 0 for g in gaps)}/{sum(g < 0 for g in gaps)})"
  return f"{mean} {intervals.shown(gap, digits)} {signs}"


def claim(found: Sequence[Row], folder: Path, name: str, command: str) -> None:
  """Appends to FOLDER/NAME-TASK-TUNING-DOMAIN.json, as `experiments.series`.

  Raises:
    BadData: a file holds something else.
  """
  for row in found:
    job = row.job
    arm = row.label if not job.groups else f"{row.label}, {job.k} of {job.groups}"
    for domain in _claimed(row):
      for seed, value in values(row, domain).items():
        results.append(
          folder / f"{name}-{job.task}-{job.tuning}-{domain}.json",
          claim=_said(row, domain),
          unit=row.measure.unit,
          against="dense",
          arm=arm,
          seed=seed,
          value=value,
          command=command,
          config={**job._asdict(), "rate": row.rate, **_settings(row)},
          versions=row.about["versions"],
          hardware=row.about["hardware"],
        )


def _claimed(row: Row) -> tuple[str, ...]:
  """Of one task all domains and their mean, if they are few; of two what trained."""
  if row.job.task == "film":
    return (*domains(row), "others")
  own = trains(row.job.task)
  return own if len(own) > 1 else (*own, "others")


def _said(row: Row, domain: str) -> str:
  """The claim in words."""
  task, tuning = row.job.task, row.job.tuning
  if row.measure is MEASURES["bits"]:
    what = "the other domains, mean over them" if domain == "others" else domain
    return f"held-out text of {what}, {tuning} tuning of a dense model on {task}"
  what = "tweets, Amazon and editorials" if domain == "others" else domain
  on = "film snippets"
  if task == "conflict":
    on += " and Amazon sentences with inverted labels"
  return f"accuracy on {what}, MiniLM, {tuning} tuning on {on}"


def _settings(row: Row) -> dict[str, Any]:
  return {name: x for name, x in row.about["plan"].items() if name != "seeds"}
