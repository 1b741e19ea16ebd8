"""The jobs of the experiment, one after the other; what was done is not done again.

A job is an arm of a task under a tuning: all rates and seeds at once.  Each model is a
line of results.jsonl: accuracies by domain as it was trained, and in the other form.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import summary
from experiments.emoe import arms, texts, train
from experiments.emoe.pack import Pack, read
from jmoe.convert import bert
from jmoe.surgery import encoders
from jmoe.surgery.encoders import EncoderModel

FILE = "results.jsonl"


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


def jobs(
  plan: Plan, tasks: Sequence[str], tunings: Sequence[str], names: Sequence[str],
  grid: Sequence[tuple[int, int]],
) -> Iterator[Job]:  # fmt: skip
  """The jobs in order; those that matter most come first."""
  usual = (plan.groups, plan.k)
  for task in tasks:
    for tuning in tunings:
      for name in names:
        # Where labels conflict three arms say it; the controls are of the first task.
        if task != "film" and name not in ("dense", "emoe", "random"):
          continue
        yield Job(task, tuning, name, *((0, 0) if name == "dense" else usual))
  for tuning in tunings[:1]:
    for groups, k in grid:
      if (groups, k) != usual:
        yield Job("film", tuning, "emoe", groups, k)


def run(
  path: Path, out: Path, plan: Plan, wanted: Sequence[Job], seconds: float
) -> int:
  """Does what is left to do; returns the number of jobs that are then left.

  Args:
    path: of the pack.
    out: folder of results.jsonl.
    plan: common settings.
    wanted: jobs.
    seconds: no job begins later than this, less what the longest one took.
  """
  begin = time.perf_counter()
  out.mkdir(parents=True, exist_ok=True)
  done = _done(out / FILE, plan)
  left = [job for job in wanted if job not in done]
  print(f"{len(left)} of {len(wanted)} jobs to do", file=sys.stderr)
  if not left:
    return 0
  pack = read(path)
  work = _Work(pack, plan)
  longest = 0.0
  for n, job in enumerate(left):
    now = time.perf_counter() - begin
    if now + longest > seconds:
      print(f"{now:.0f} s: {len(left) - n} jobs are left", file=sys.stderr)
      return len(left) - n
    records = work.do(job)
    with (out / FILE).open("a") as lines:
      lines.writelines(json.dumps(record) + "\n" for record in records)
    took = time.perf_counter() - begin - now
    longest = max(longest, took)
    mean = np.mean([record["accuracy"]["film"] for record in records])
    print(
      f"{now + took:.0f} s: {n + 1}/{len(left)} {' '.join(map(str, job))}, "
      f"{took:.1f} s, film {mean:.4f}",
      file=sys.stderr,
      flush=True,
    )
  return 0


class _Work:
  """Weights and texts, there once for all jobs."""

  def __init__(self, pack: Pack, plan: Plan):
    self._pack, self._plan = pack, plan
    self._dense = bert.from_released(pack.config, pack.tensors)
    # The tables of tokens that no text has are dead weight in every moment.
    used, tokens = np.unique(pack.tokens_MS, return_inverse=True)
    assert used[0] == 0, "padding is token 0"
    self._tokens_MS = tokens.reshape(pack.tokens_MS.shape).astype(np.int32)
    self._dense = _of_words(self._dense, used, pack.tokens_MS.shape[1])
    self._splits = {task: texts.split(pack, task) for task in texts.TASKS}

  def do(self, job: Job) -> list[dict[str, Any]]:
    """The records of a job."""
    plan, parts = self._plan, self._splits[job.task]
    begun = self._start(job.arm, job.groups, job.k)
    rates = list(plan.rates[job.tuning])
    each = [(rate, seed) for rate in rates for seed in plan.seeds]
    orders = {
      seed: texts.order(
        parts, seed=seed, examples=plan.examples, batch=plan.batch, epochs=plan.epochs
      )
      for seed in plan.seeds
    }
    models = train.Model(
      jnp.asarray(np.stack([orders[seed] for _, seed in each])),
      jnp.asarray([rate for rate, _ in each], jnp.float32),
      jnp.stack([jax.random.key(seed) for _, seed in each]),
    )
    tokens_MS, label_M = jnp.asarray(self._tokens_MS), jnp.asarray(parts.label_M)
    params, state = jax.device_put((dict(begun.model.params), dict(begun.model.state)))
    params, state, head, losses = train.trained(
      params,
      state,
      jnp.float32(begun.sign),
      jnp.asarray(begun.follow),
      models,
      tokens_MS,
      label_M,
      settings=self._settings(begun.model, job.tuning),
    )
    own = self._accuracies(begun.model, params, state, head, parts)
    other, name = None, "groups"
    if begun.orders:
      name = "dense"
      joined = jax.jit(jax.vmap(lambda p: dict(self._joined(begun, p).params)))(params)
      other = self._accuracies(self._dense, joined, {}, head, parts)
    else:
      like = self._start("emoe", plan.groups, plan.k)
      cut, means = jax.jit(jax.vmap(lambda p: arms.in_groups(p, like)))(params)
      other = self._accuracies(like.model, cut, means, head, parts)
    last = np.asarray(losses)[:, -20:].mean(1)
    return [
      {
        **job._asdict(),
        "rate": rate,
        "seed": seed,
        "plan": _told(plan, job),
        "versions": summary.versions(),
        "hardware": summary.hardware(),
        "loss": float(last[n]),
        "accuracy": own[n],
        f"accuracy_as_{name}": other[n],
      }
      for n, (rate, seed) in enumerate(each)
    ]

  def _start(self, name: str, groups: int, k: int) -> arms.Start:
    return arms.start(name, self._dense, groups=groups, k=k, layers=self._plan.layers)

  def _joined(self, begun: arms.Start, params: Any) -> EncoderModel:
    model = begun.model._replace(params=params)
    return encoders.ungrouped(encoders.Grouped(model, begun.orders))

  def _settings(self, model: EncoderModel, tuning: str) -> train.Settings:
    return train.Settings(model.config, tuning, self._plan.precision)

  def _accuracies(
    self, model: EncoderModel, params: Any, state: Any, head: Any, parts: texts.Split
  ) -> list[dict[str, float]]:
    """Of each model: by domain of the tests, and of the texts that choose a rate."""
    groups = {"choose": parts.choose, **parts.test}
    groups = {name: some[: self._plan.few] for name, some in groups.items()}
    batch = min(self._plan.eval_batch, max(map(len, groups.values())))
    numbers = np.concatenate(list(groups.values()))
    rows = np.concatenate([numbers, np.zeros(-len(numbers) % batch, int)])
    found = train.right(
      params,
      state,
      head,
      jnp.asarray(self._tokens_MS[rows]),
      jnp.asarray(parts.label_M[rows]),
      settings=self._settings(model, "full"),
      batch=batch,
    )
    each = np.asarray(found)[:, : len(numbers)]
    ends = np.cumsum([len(some) for some in groups.values()])
    split = np.split(each, ends[:-1], axis=1)
    return [
      {name: float(one[n].mean()) for name, one in zip(groups, split, strict=True)}
      for n in range(len(each))
    ]


def _of_words(model: EncoderModel, used: np.ndarray, longest: int) -> EncoderModel:
  """The encoder with the rows of its tables that are read."""
  params = dict(model.params)
  params["words.embedding"] = params["words.embedding"][used]
  params["positions.embedding"] = params["positions.embedding"][:longest]
  config = model.config.__class__(
    **{
      **{f: getattr(model.config, f) for f in model.config.__dataclass_fields__},
      "vocab_size": len(used),
      "max_positions": longest,
    }
  )
  return EncoderModel(config, params)


def _told(plan: Plan, job: Job) -> dict[str, Any]:
  """What must be the same for records to belong together."""
  return {
    "layers": list(plan.layers),
    "examples": plan.examples,
    "batch": plan.batch,
    "epochs": plan.epochs,
    "precision": plan.precision,
    "few": plan.few,
    "rates": list(plan.rates[job.tuning]),
    "seeds": list(plan.seeds),
  }


def _done(path: Path, plan: Plan) -> set[Job]:
  """Jobs of which all models are there; records of other settings are not counted."""
  if not path.exists():
    return set()
  counts: dict[Job, int] = {}
  for record in records(path):
    job = Job(*(record[name] for name in Job._fields))
    if record["plan"] == json.loads(json.dumps(_told(plan, job))):
      counts[job] = counts.get(job, 0) + 1
  return {
    job
    for job, count in counts.items()
    if count >= len(plan.seeds) * len(plan.rates[job.tuning])
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
