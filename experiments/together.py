"""Several seeds of one run as one program, in a folder each, like runs of their own.

States and batches are stacked and the step is vmapped (`experiments.seeds`); loop,
reports and checkpoints are those of a single run.  So a seed can be reported, compared,
generated from and fine-tuned, and an arm that was stopped goes on where it was.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments import (
  checkpoint,
  dataset,
  evaluate,
  loop,
  opening,
  seeds,
  sitting,
  tokens,
  workdir,
)
from experiments.batches import Batch
from experiments.compiling import Ahead, Wanted
from experiments.config import Run
from experiments.program import Program, program
from experiments.signals import Stop
from experiments.state import TrainState
from experiments.summary import summary


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the runs of a series read."""

  texts: dataset.Texts
  encoded: tokens.Encoded
  held_out: Sequence[Batch]  # packed once for all of them


@dataclasses.dataclass
class _Seed:
  """One of the runs."""

  run: Run
  folder: epath.Path
  program: Program
  batches: Any
  checkpoints: checkpoint.Checkpoints
  state: TrainState | None  # until it is part of the stack


def finish(
  runs: Sequence[Run],
  folders: Sequence[epath.Path],
  reading: Reading,
  *,
  command: Sequence[str],
  stop: Stop,
  saved: bool = True,
  ahead: Ahead | None = None,
  keep_every: int | None = None,
) -> None:
  """Trains what is missing of some runs, evaluates, and writes their folders.

  Runs that have come equally far share a program; after a kill while they were saved
  they may have come to two steps, and are two programs.

  Args:
    runs: that differ in their seeds alone.
    folders: of the runs; `experiments.workdir` has checked whose they are.
    reading: of all of them.
    command: that was typed.
    stop: asked between two steps.
    saved: whether checkpoints are written.
    ahead: steps that may be compiled already.
    keep_every: steps whose checkpoints stay, beside the last two; None: none.

  Raises:
    BadCheckpoint, BadConfig, Diverged, Stopped: see there.
  """
  ahead = Ahead() if ahead is None else ahead
  first = program_of(runs[0], reading)
  with contextlib.ExitStack() as kept:
    found = []
    for run, folder in zip(runs, folders, strict=True):
      made = first.of_seed(run.seed)
      begun = (folder / "config.json").exists()
      # It may be refused, before the folder is this run's.
      state = None if begun else opening.started(run, made, reading.encoded)
      workdir.claim(run, folder)
      kept.enter_context(workdir.held(folder))
      found.append(_opened(run, folder, reading, made, state, keep_every))
      kept.callback(found[-1].checkpoints.close)
    found.sort(key=_done, reverse=True)
    for _, equal in itertools.groupby(found, _done):
      _Together(list(equal), reading, command, stop, saved, ahead).finish()


def _done(seed: _Seed) -> int:
  assert seed.state is not None
  return loop.steps_of(seed.state)


def program_of(run: Run, reading: Reading) -> Program:
  """What trains and evaluates a run of the series."""
  return program(
    run,
    byte_lengths=reading.encoded.vocabulary.byte_lengths,
    num_domains=len(reading.texts.domains),
  )


def _opened(
  run: Run,
  folder: epath.Path,
  reading: Reading,
  made: Program,
  state: TrainState | None,
  keep_every: int | None,
) -> _Seed:
  """A run with its last state, or with the one given if it is new."""
  texts, encoded = reading.texts, reading.encoded
  batches = opening.training_batches(run, encoded)
  facts = opening.facts(run, texts, encoded)
  checkpoints = checkpoint.Checkpoints(
    folder / "checkpoints", facts, keep_every=keep_every
  )
  if checkpoints.latest is not None:
    state = checkpoints.restore(jax.eval_shape(made.init), batches)
  elif state is None:
    state = opening.started(run, made, encoded)
  workdir.write_json(folder / "manifest.json", texts.manifest)
  encoded.vocabulary.save(Path(folder / "vocabulary"))
  return _Seed(run, folder, made, batches, checkpoints, state)


class _Together:
  """Runs that have come equally far."""

  def __init__(
    self,
    found: list[_Seed],
    reading: Reading,
    command: Sequence[str],
    stop: Stop,
    saved: bool,
    ahead: Ahead,
  ):
    self.seeds, self.reading, self.saved = found, reading, saved
    self.ahead = ahead
    self.command, self.stop = command, stop
    self.first = found[0]
    self.clocks = [opening.Clock(seed.folder) for seed in found]
    self.memory: Mapping[str, int] = {}
    self.shared: list[dict[str, Any]] = [_shared(seed.folder) for seed in found]
    self.state = seeds.stack([seed.state for seed in found])
    for seed in found:
      seed.state = None  # one copy is enough
    done = loop.steps_of(self.state)
    self.reports = [
      loop.Report(seed.run, seed.folder, step=done, shown=seed is self.first)
      for seed in found
    ]

  def finish(self) -> None:
    run, made = self.first.run, self.first.program
    left = loop.steps_of(self.state) < run.steps
    steps = self.ahead.steps(Wanted(run, made, len(self.seeds), trains=left))
    try:
      if left:
        self.memory = steps.memory
        self.state = loop.train(
          self.state,
          _Stacked([seed.batches for seed in self.seeds]),
          train_step=steps.train,
          steps=run.steps,
          save_every=run.save_every,
          save=self._save,
          report=self._report,
          stop=self.stop,
        )
    finally:
      for each in (*self.reports, *self.clocks):
        each.close()
    bits = [
      sitting.evaluated(
        seed.run,
        seed.folder,
        state,
        steps.evaluate,
        self.reading.texts,
        self.stop.between(self.reading.held_out, run.steps),
      ).bits
      for seed, state in zip(self.seeds, seeds.unstack(self.state), strict=True)
    ]
    for n, of_seed in enumerate(bits):
      self._summarise(n, run.steps, of_seed)

  def _save(self, state: TrainState) -> None:
    for n, one in enumerate(seeds.unstack(state)):
      seed = self.seeds[n]
      if self.saved:
        seed.checkpoints.save(one, seed.batches)
      self._summarise(n, loop.steps_of(state))

  def _report(self, step: int, batch: Batch, values: Any, found: Any) -> None:
    values = jax.device_get(values)  # one transfer for all
    every = self.first.run.watch_every
    for n, report in enumerate(self.reports):
      watched = found if step % every == 0 or step == 1 else None
      one = jax.tree.map(lambda x, n=n: x[n], (batch, values, watched))
      report(step, *one)

  def _summarise(self, n: int, step: int, bits: evaluate.Bits | None = None) -> None:
    """Writes the summary.json of a seed."""
    seed, report, texts = self.seeds[n], self.reports[n], self.reading.texts
    body = summary(
      seed.run,
      step=step,
      seconds=self.clocks[n].seconds(),
      speeds=report.speeds,
      skipped=report.skipped,
      alarms=report.alarms.counts,
      data={"corpus": seed.run.data.corpus, "digest": texts.digest},
      command=self.command,
      bits=bits,
    )
    shared: dict[str, Any] = self.shared[n]
    if self.memory:  # something was trained in this sitting
      many, before = len(self.seeds), shared.get("seeds_at_once", len(self.seeds))
      # Speeds of sittings with other numbers of seeds have no common divisor.
      shared = {
        "seeds_at_once": many if many == before else None,
        "memory": self.memory,
      }
    workdir.write_json(seed.folder / "summary.json", body | shared)


def _shared(folder: epath.Path) -> dict[str, Any]:
  """What an earlier sitting wrote of the program that the seed was part of."""
  path = folder / "summary.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  return {name: found[name] for name in ("seeds_at_once", "memory") if name in found}


class _Stacked(Iterator[Batch]):
  """A batch of each of several iterators at a time, stacked."""

  def __init__(self, batches: Sequence[Iterator[Batch]]):
    self._batches = batches

  def __next__(self) -> Batch:
    each = [next(batches) for batches in self._batches]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}
