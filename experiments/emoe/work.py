"""A job done: its models trained as one program, and asked in both of their forms."""
# SPDX-License-Identifier: Apache-2.0

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import summary
from experiments.emoe import arms, texts, train
from experiments.emoe.jobs import Job, Plan, told
from experiments.emoe.pack import Pack
from jmoe.convert import bert
from jmoe.surgery import encoders
from jmoe.surgery.encoders import EncoderModel


class Work:
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
    rows, batch = self._rows(self._splits[job.task])[1:]
    texts_ = self._texts(rows, self._splits[job.task])
    asked = dict(settings=self._settings(begun.model, "full"), batch=batch)
    train.right.lower(*shapes[:3], *texts_, **asked).compile()

  def do(self, job: Job) -> list[dict[str, Any]]:
    """The records of a job."""
    plan, parts = self._plan, self._splits[job.task]
    begun, each = self._start(job.arm, job.groups, job.k), self._models(job)
    given = self._given(job, begun)
    params, state, head, losses = train.trained(*given, **self._said(job, begun))
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
        "plan": told(plan, job),
        "versions": summary.versions(),
        "hardware": summary.hardware(),
        "loss": float(last[n]),
        "accuracy": own[n],
        f"accuracy_as_{name}": other[n],
      }
      for n, (rate, seed) in enumerate(each)
    ]

  def _models(self, job: Job) -> list[tuple[float, int]]:
    """(rate, seed) of each."""
    return [(r, s) for r in self._plan.rates[job.tuning] for s in self._plan.seeds]

  def _given(self, job: Job, begun: arms.Start) -> tuple[Any, ...]:
    plan, parts = self._plan, self._splits[job.task]
    sizes = dict(examples=plan.examples, batch=plan.batch, epochs=plan.epochs)
    orders = {seed: texts.order(parts, seed=seed, **sizes) for seed in plan.seeds}
    each = self._models(job)
    models = train.Model(
      jnp.asarray(np.stack([orders[seed] for _, seed in each])),
      jnp.asarray([rate for rate, _ in each], jnp.float32),
      jnp.stack([jax.random.key(seed) for _, seed in each]),
    )
    arrays = jax.device_put((dict(begun.model.params), dict(begun.model.state)))
    how = jnp.float32(begun.sign), jnp.asarray(begun.follow)
    return (*arrays, *how, models, *self._texts(slice(None), parts))

  def _texts(self, rows: Any, parts: texts.Split) -> tuple[Any, Any]:
    return jnp.asarray(self._tokens_MS[rows]), jnp.asarray(parts.label_M[rows])

  def _said(self, job: Job, begun: arms.Start) -> dict[str, Any]:
    return {"settings": self._settings(begun.model, job.tuning)}

  def _rows(self, parts: texts.Split) -> tuple[dict[str, int], np.ndarray, int]:
    """(numbers of texts that are asked by name, all of them, texts at a time).

    Filled up to the same number for all tasks, which so share a program.
    """
    plan = self._plan

    def asked(parts: texts.Split) -> dict[str, np.ndarray]:
      both = {"choose": parts.choose, **parts.test}
      return {name: some[: plan.few] for name, some in both.items()}

    totals = [sum(map(len, asked(p).values())) for p in self._splits.values()]
    batch = min(plan.eval_batch, max(totals))
    own = asked(parts)
    numbers = np.concatenate(list(own.values()))
    fill = np.zeros(-(-max(totals) // batch) * batch - len(numbers), int)
    counts = {name: len(some) for name, some in own.items()}
    return counts, np.concatenate([numbers, fill]), batch

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
    counts, rows, batch = self._rows(parts)
    asked = dict(settings=self._settings(model, "full"), batch=batch)
    found = train.right(params, state, head, *self._texts(rows, parts), **asked)
    ends = np.cumsum(list(counts.values()))
    split = np.split(np.asarray(found)[:, : ends[-1]], ends[:-1], axis=1)
    return [
      {name: float(one[n].mean()) for name, one in zip(counts, split, strict=True)}
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


def _of_words(model: EncoderModel, used: np.ndarray, longest: int) -> EncoderModel:
  """The encoder with the rows of its tables that are read."""
  params = dict(model.params)
  params["words.embedding"] = params["words.embedding"][used]
  params["positions.embedding"] = params["positions.embedding"][:longest]
  config = dataclasses.replace(
    model.config, vocab_size=len(used), max_positions=longest
  )
  return EncoderModel(config, params)
