"""A job done: its models trained as one program, and asked in both of their forms."""
# SPDX-License-Identifier: Apache-2.0

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import summary
from experiments.emoe import arms, material, train
from experiments.emoe.jobs import Job, Plan, told


class Work:
  """A model and texts, there once for all jobs."""

  def __init__(self, given: material.Material, plan: Plan):
    self._dense, self._plan, self.measure = given.dense, plan, given.measure
    self._splits, self._worth_M = given.splits, given.worth_M
    self._all = {task: jax.device_put(dict(rows)) for task, rows in given.rows.items()}
    self._started: dict[Any, arms.Start] = {}

  def form(self, job: Job) -> Any:
    """What decides which program a job has."""
    return self._start(job.arm, job.groups, job.k).model.config, job.tuning

  def compile(self, job: Job) -> None:
    """Compiles how a job trains and is asked, for the cache."""
    begun = self._start(job.arm, job.groups, job.k)
    lowered = train.trained.lower(*self._given(job, begun), **self._said(job, begun))
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info
    )
    lowered.compile()
    rows, batch = self._rows(job.task)[1:]
    asked = dict(settings=self._settings(begun.model, "full"), batch=batch)
    train.scores.lower(*shapes[:3], self._texts(rows, job.task), **asked).compile()

  def do(self, job: Job) -> list[dict[str, Any]]:
    """The records of a job."""
    plan, task = self._plan, job.task
    begun, each = self._start(job.arm, job.groups, job.k), self._models(job)
    given = self._given(job, begun)
    params, state, head, losses = train.trained(*given, **self._said(job, begun))
    found = {"": self._asked(begun.model, params, state, head, task)}
    if begun.orders:
      dense = jax.jit(jax.vmap(lambda p: arms.joined(p, begun)))(params)
      found["_as_dense"] = self._asked(self._dense, dense, {}, head, task)
    else:
      like = self._start("emoe", plan.groups, plan.k)
      cut, means = jax.jit(jax.vmap(lambda p: arms.in_groups(p, like)))(params)
      found["_as_groups"] = self._asked(like.model, cut, means, head, task)
      if not head:  # a model that is whole can be asked before it is tuned too
        first = {n: jnp.broadcast_to(x, params[n].shape) for n, x in given[0].items()}
        found["_before"] = self._asked(begun.model, first, state, head, task)
    last = np.asarray(losses)[:, -20:].mean(1)
    return [
      {
        **job._asdict(),
        "rate": rate,
        "seed": seed,
        "plan": told(plan, job),
        "versions": summary.versions(),
        "hardware": summary.hardware(),
        "loss": float(last[n]),
        **{f"{self.measure}{form}": values[n] for form, values in found.items()},
      }
      for n, (rate, seed) in enumerate(each)
    ]

  def _models(self, job: Job) -> list[tuple[float, int]]:
    """(rate, seed) of each."""
    return [(r, s) for r in self._plan.rates[job.tuning] for s in self._plan.seeds]

  def _given(self, job: Job, begun: arms.Start) -> tuple[Any, ...]:
    plan, parts = self._plan, self._splits[job.task]
    sizes = dict(examples=plan.examples, batch=plan.batch, epochs=plan.epochs)
    orders = {seed: material.order(parts, seed=seed, **sizes) for seed in plan.seeds}
    each = self._models(job)
    models = train.Model(
      jnp.asarray(np.stack([orders[seed] for _, seed in each])),
      jnp.asarray([rate for rate, _ in each], jnp.float32),
      jnp.stack([jax.random.key(seed) for _, seed in each]),
    )
    arrays = jax.device_put((dict(begun.model.params), dict(begun.model.state)))
    how = jnp.float32(begun.sign), jnp.asarray(begun.follow)
    return (*arrays, *how, models, self._all[job.task])

  def _texts(self, rows: np.ndarray, task: str) -> dict[str, Any]:
    return {name: x[jnp.asarray(rows)] for name, x in self._all[task].items()}

  def _said(self, job: Job, begun: arms.Start) -> dict[str, Any]:
    return {"settings": self._settings(begun.model, job.tuning)}

  def _rows(self, task: str) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """(numbers of texts that are asked by name, all of them, texts at a time).

    Filled up to the same number for all tasks, which so share a program.
    """
    plan = self._plan

    def asked(parts: material.Split) -> dict[str, np.ndarray]:
      both = {"choose": parts.choose, **parts.test}
      return {name: some[: plan.few] for name, some in both.items()}

    totals = [sum(map(len, asked(p).values())) for p in self._splits.values()]
    batch = min(plan.eval_batch, max(totals))
    own = asked(self._splits[task])
    numbers = np.concatenate(list(own.values()))
    fill = np.zeros(-(-max(totals) // batch) * batch - len(numbers), int)
    return own, np.concatenate([numbers, fill]), batch

  def _start(self, name: str, groups: int, k: int) -> arms.Start:
    if (wanted := (name, groups, k)) not in self._started:
      layers = self._plan.layers
      begun = arms.start(name, self._dense, groups=groups, k=k, layers=layers)
      self._started[wanted] = begun
    return self._started[wanted]

  def _settings(self, model: Any, tuning: str) -> train.Settings:
    return train.Settings(model.config, tuning, self._plan.precision)

  def _asked(
    self, model: Any, params: Any, state: Any, head: Any, task: str
  ) -> list[dict[str, float]]:
    """Of each model: by domain of the tests, and of the texts that choose a rate."""
    own, rows, batch = self._rows(task)
    asked = dict(settings=self._settings(model, "full"), batch=batch)
    found = train.scores(params, state, head, self._texts(rows, task), **asked)
    ends = np.cumsum([len(some) for some in own.values()])
    split = np.split(np.asarray(found)[:, : ends[-1]], ends[:-1], axis=1)
    return [
      {
        name: float(one[n].sum(dtype=np.float64) / self._worth_M[some].sum())
        for (name, some), one in zip(own.items(), split, strict=True)
      }
      for n in range(len(found))
    ]


class Ahead:
  """Programs compiled in threads, once for jobs that share one."""

  def __init__(self, work: Work, left: Sequence[Job], workers: int):
    self._pool = concurrent.futures.ThreadPoolExecutor(max(1, workers))
    self._futures: dict[Any, concurrent.futures.Future] = {}
    self._of: dict[Job, Any] = {}
    for job in left if workers > 1 else ():
      form = self._of[job] = work.form(job)
      if form not in self._futures:
        self._futures[form] = self._pool.submit(work.compile, job)

  def __enter__(self) -> "Ahead":
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)

  def wait(self, job: Job) -> None:
    """Until the job's program is there."""
    if job in self._of:
      self._futures[self._of[job]].result()
