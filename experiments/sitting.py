"""One run, from where its folder says it is to its end, or to a wish to stop."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from experiments import (
  checkpoint,
  data,
  dataset,
  evaluate,
  fitting,
  hosts,
  loop,
  opening,
  restoring,
  routing,
  state as states,
  tokens,
)
from experiments.config import Run
from experiments.errors import Diverged, Stopped
from experiments.program import program
from experiments.remote import Place
from experiments.signals import Stop
from experiments.summary import summary
from experiments.workdir import claim, held, write_json
from jmoe.analysis import cost


@dataclasses.dataclass(frozen=True)
class Options:
  """How a command line wants its runs done."""

  cache: Path
  command: Sequence[str] = ()
  profile: tuple[int, int] | None = None  # first and last step to trace
  mesh: str | None = None  # as in "data=2,expert=4"; None: one device
  strategy: str | None = None  # as for `strategies.carrier`, of all sparse layers


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished run."""

  run: Run
  state: states.TrainState
  bits: evaluate.Bits


class Sitting:
  """A run in its folder.

  Args:
    run: to train, or to go on with.
    where: its folder; `experiments.workdir` has checked whose it is.
    texts: the data set.
    encoded: the same as tokens.
    baselines: bits per byte of other means, for the summary.
    options: of the command line.
    stop: asked between two steps.
  """

  def __init__(
    self,
    run: Run,
    where: Place,
    texts: dataset.Texts,
    encoded: tokens.Encoded,
    *,
    baselines: Mapping[str, evaluate.Bits],
    options: Options,
    stop: Stop,
  ):
    self.run, self.texts, self.encoded = run, texts, encoded
    self.where, self.folder = where, where.folder
    self.baselines, self.options, self.stop = baselines, options, stop
    self.spread = fitting.of(run, options.mesh, strategy=options.strategy)
    self.program = program(
      run,
      byte_lengths=encoded.vocabulary.byte_lengths,
      num_domains=len(texts.domains),
      spread=self.spread,
    )
    self.rows = None if self.spread is None else self.spread.rows(run)
    readers = None if self.rows is None else self.rows.readers
    self.batches = opening.training_batches(run, encoded, readers)

  def finished(self) -> Trained:
    """Trains what is missing, evaluates, and writes the folder's files.

    Raises:
      BadCheckpoint, BadConfig, Diverged, Stopped, Unreachable: see there.
    """
    begun = hosts.share("the folder", (self.folder / "config.json").exists())
    with hosts.together("the first state", seconds=hosts.BUILDING):
      state = None if begun else self._started()  # may be fetched, or be refused
    with contextlib.ExitStack() as kept:
      with hosts.together("the folder"):
        if hosts.is_first():
          claim(self.run, self.folder)  # if it is killed from now on it is this run's
          kept.enter_context(held(self.folder))
      with hosts.together("the folder is seen"):
        if hosts.count() > 1:
          self._send()
        hosts.check_visible(self.where.seen / "config.json", "--workdir")
        restoring.check_readable(self.folder / "checkpoints")
      if not self.where.is_copy:
        restoring.check_same(self.folder / "checkpoints")
      return self._finished(state)

  def _finished(self, state: states.TrainState | None) -> Trained:
    """The same, from the state of a new run if this is one."""
    run, folder = self.run, self.folder
    checkpoints = checkpoint.Checkpoints(
      folder / "checkpoints",
      opening.facts(run, self.texts, self.encoded),
      shared=not self.where.is_copy,
    )
    if checkpoints.latest is not None:
      like = jax.eval_shape(self.program.init)
      like = like if self.spread is None else self.spread.shapes(like)
      with hosts.together("the checkpoint"):
        state = checkpoints.restore(like, self.batches)
    elif state is None:
      state = self._started()
    if hosts.is_first():
      write_json(folder / "manifest.json", self.texts.manifest)
      self.encoded.vocabulary.save(Path(folder / "vocabulary"))
    self._send()  # a store that takes nothing is found before an hour is spent
    if hosts.is_first():
      print(_headline(run) + self._over())
    clock = opening.Clock(folder)
    report, state = self._trained(state, checkpoints, clock)
    step = self._eval_step()
    batches = opening.held_out_batches(run, self.encoded)
    batches = self.stop.between(batches, int(state.step))
    found = evaluated(run, folder, state, step, self.texts, batches)
    self._summarise(
      run.steps,
      report,
      clock,
      bits=found.bits,
      baselines=self.baselines,
      digests=checkpoint.digests(state.params),
    )
    self._send()
    return Trained(run, state, found.bits)

  def _trained(
    self,
    state: states.TrainState,
    checkpoints: checkpoint.Checkpoints,
    clock: opening.Clock,
  ) -> tuple[loop.Report, states.TrainState]:
    """What was reported, and the last state."""
    run, folder, done = self.run, self.folder, int(state.step)
    profile = None
    if self.options.profile is not None and hosts.is_first():
      profile = loop.Profile(folder / "profile", *self.options.profile, done=done)
    report = loop.Report(run, folder, step=done)

    def save(state: states.TrainState) -> None:
      self.where.wait()
      checkpoints.save(state, self.batches)
      self._summarise(int(state.step), report, clock)
      self.where.send(ready=checkpoints.wait)

    try:
      try:
        state = loop.train(
          state,
          self.batches,
          train_step=self._train_step(),
          steps=run.steps,
          save_every=run.save_every,
          save=save,
          report=report,
          stop=self.stop,
          profile=profile,
        )
      finally:
        if profile is not None:
          profile.close()
        report.close()
        checkpoints.close()
        clock.close()
    except (Diverged, Stopped):
      self._summarise(report.step, report, clock)
      self._send()
      raise
    return report, state

  def _started(self) -> states.TrainState:
    return opening.started(self.run, self.program, self.encoded, self.spread)

  def _over(self) -> str:
    return "" if self.spread is None else f", {self.spread.said(self.run.model)}"

  def _train_step(self) -> Any:
    if self.spread is not None:
      return self.spread.train_step(self.program, self.rows)
    return jax.jit(self.program.train_step, donate_argnums=0)

  def _eval_step(self) -> Any:
    if self.spread is not None:
      return self.spread.eval_step(self.program)
    return jax.jit(self.program.eval_step)

  def _send(self) -> None:
    """Brings the store up to the folder, where they are two."""
    self.where.send()
    self.where.wait()

  def _summarise(
    self, step: int, report: loop.Report, clock: opening.Clock, **end: Any
  ) -> None:
    """Writes summary.json."""
    if not hosts.is_first():
      return
    found = summary(
      self.run,
      step=step,
      seconds=clock.seconds(),
      speeds=report.speeds,
      skipped=report.skipped,
      alarms=report.alarms.counts,
      data={"corpus": self.run.data.corpus, "digest": self.texts.digest},
      command=self.options.command,
      **end,
    )
    write_json(self.folder / "summary.json", found)


def evaluated(
  run: Run,
  folder: epath.Path,
  state: states.TrainState,
  eval_step: Any,
  texts: dataset.Texts,
  batches: Iterable[data.Batch],
) -> evaluate.Evaluation:
  """One pass over the held-out documents, also written to evaluation.json.

  Args:
    run: that was trained.
    folder: of the run.
    state: at its end.
    eval_step: of its program, jitted.
    texts: the data set.
    batches: of `opening.held_out_batches`.
  """
  found = evaluate.evaluation(
    lambda batch: eval_step(state.params, state.balance, batch),
    batches,
    evaluate.domain_sizes(texts.held_out, texts.domains),
    texts.domains,
  )
  layers = [
    {"name": name, "load": load.tolist()}
    for name, load in routing.by_depth(run.model, found.loads)
  ]
  body = {"bits_per_byte": found.bits, "layers": layers}
  if hosts.is_first():
    write_json(folder / "evaluation.json", body | {"domains": list(texts.domains)})
  return found


def _headline(run: Run) -> str:
  counted = cost.parameters(run.model)
  flops = 3 * cost.flops_per_token(run.model, seq=run.data.seq)
  return (
    f"{run.name}: {counted.total / 1e6:.2f}M parameters, {counted.active / 1e6:.2f}M "
    f"active, {flops / 1e6:.1f} MFLOP a trained token, on {jax.default_backend()}"
  )
