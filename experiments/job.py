"""From checked runs and their folders to trained models and a table of how they did."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from experiments import (
  checkpoint,
  data,
  dataset,
  evaluate,
  loop,
  optim,
  routing,
  sample,
  state as states,
  tokens,
  vocabulary,
)
from experiments.config import Run
from experiments.errors import BadCheckpoint, BadConfig, Diverged
from experiments.program import Program, program
from experiments.remote import Place, place
from experiments.signals import Stop
from experiments.summary import summary
from experiments.workdir import claim, write_json
from jmoe.analysis import cost
from jmoe.use import to_jsonable


@dataclasses.dataclass(frozen=True)
class Options:
  """How a command line wants its runs done."""

  cache: Path
  command: Sequence[str] = ()
  profile: tuple[int, int] | None = None  # first and last step to trace


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished run."""

  run: Run
  state: states.TrainState
  bits: evaluate.Bits


def loaded(run: Run, cache: Path) -> tuple[dataset.Texts, tokens.Encoded]:
  """The data of a run, built first if the cache does not hold it.

  Raises:
    BadData: see `experiments.dataset`.
  """
  texts = dataset.load(cache, run.data)
  words = vocabulary.of(run.data.tokenizer, cache, texts)
  return texts, tokens.load(cache, texts, words)


def check(runs: Sequence[tuple[Run, epath.Path]]) -> None:
  """Whether optimizers fit models, before any data is built.

  Raises:
    BadConfig: they do not.
  """
  for run, _ in runs:
    try:
      _, shapes = states.blueprint(run.model, run.param_dtype)
      optim.optimizer(run.optim, steps=run.steps, params=shapes)
    except ValueError as error:
      raise BadConfig(str(error)) from error


def execute(runs: Sequence[tuple[Run, epath.Path]], options: Options) -> None:
  """Trains each run in its folder, or goes on with it, and prints how well it did.

  Raises:
    BadConfig, BadData, BadCheckpoint, Diverged, Stopped: see there.
  """
  check(runs)
  texts, encoded = loaded(runs[0][0], options.cache)
  held_out = list(texts.held_out)
  baselines = {
    "gzip -9": evaluate.gzip_bits(held_out, texts.domains, alone=False),
    "gzip -9, each alone": evaluate.gzip_bits(held_out, texts.domains, alone=True),
  }
  with Stop() as stop:
    finished = []
    for run, folder in runs:
      with place(folder) as where:
        sitting = _Sitting(run, where, texts, encoded, baselines, options, stop)
        finished.append(sitting.finished())
  columns = {trained.run.name: trained.bits for trained in finished} | baselines
  sizes = evaluate.domain_sizes(held_out, texts.domains)
  width = max(12, *(len(domain) + 1 for domain in sizes))
  print(f"\nbits per byte on {len(held_out)} held-out documents")
  print(f"{'':<{width}}{'bytes':>9}" + "".join(f"{name:>22}" for name in columns))
  for domain, size in sizes.items():
    bits = "".join(f"{column[domain]:>22.3f}" for column in columns.values())
    print(f"{domain:<{width}}{size:>9}{bits}")
  print("gzip -9 has one file for each domain, or one for each document alone.")
  trained = finished[0]
  if trained.run.sample_bytes:
    print(f"\nsample of {trained.run.name}:\n{_sample(trained, encoded.vocabulary)}")


def evaluated(
  run: Run,
  folder: epath.Path,
  state: states.TrainState,
  eval_step: Any,
  texts: dataset.Texts,
  encoded: tokens.Encoded,
) -> evaluate.Evaluation:
  """One pass over the held-out documents, also written to evaluation.json.

  Args:
    run: that was trained.
    folder: of the run.
    state: at its end.
    eval_step: of its program, jitted.
    texts: the data set.
    encoded: the same as tokens.
  """
  of = run.data
  windows = data.Windows(encoded.held_out, seq=of.seq, context=of.eval_context)
  found = evaluate.evaluation(
    lambda batch: eval_step(state.params, state.balance, batch),
    data.one_pass(windows, batch=of.batch, seq=of.seq),
    evaluate.domain_sizes(texts.held_out, texts.domains),
    texts.domains,
  )
  layers = [
    {"name": name, "load": load.tolist()}
    for name, load in routing.by_depth(run.model, found.loads)
  ]
  body = {"bits_per_byte": found.bits, "layers": layers}
  write_json(folder / "evaluation.json", body | {"domains": list(texts.domains)})
  return found


class _Sitting:
  """One run, from where its folder says it is to its end, or to a wish to stop."""

  def __init__(
    self,
    run: Run,
    where: Place,
    texts: dataset.Texts,
    encoded: tokens.Encoded,
    baselines: Mapping[str, evaluate.Bits],
    options: Options,
    stop: Stop,
  ):
    self.run, self.texts, self.encoded = run, texts, encoded
    self.where, self.folder = where, where.folder
    self.baselines, self.options, self.stop = baselines, options, stop
    self.program = program(
      run,
      byte_lengths=encoded.vocabulary.byte_lengths,
      num_domains=len(texts.domains),
    )

  def finished(self) -> Trained:
    """Trains what is missing, evaluates, and writes the folder's files."""
    run, folder = self.run, self.folder
    begun = (folder / "config.json").exists()
    state = None if begun else _started(run, self.program)  # it may be refused
    claim(run, folder)  # before all else: a folder that is killed now is this run's
    batches = self._batches()
    facts = {
      "config": to_jsonable(run),
      "text": self.texts.digest,
      "vocabulary": self.encoded.vocabulary.digest,
      "processes": jax.process_count(),  # the order of batches depends on their number
    }
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", facts)
    if checkpoints.latest is not None:
      like = jax.eval_shape(self.program.init)
      state = checkpoints.restore(like, batches)
    elif state is None:
      state = _started(run, self.program)
    write_json(folder / "manifest.json", self.texts.manifest)
    self.encoded.vocabulary.save(folder / "vocabulary")
    print(_headline(run))
    report = loop.Report(run, folder, step=int(state.step))
    before, begin = _seconds(folder), time.perf_counter()

    def summarised(step: int, **end: Any) -> None:
      seconds = before + time.perf_counter() - begin
      found = self._summary(step, seconds, report, **end)
      write_json(folder / "summary.json", found)

    def save(state: states.TrainState) -> None:
      self.where.wait()
      checkpoints.save(state, batches)
      summarised(int(state.step))
      self.where.send(ready=checkpoints.wait)

    profile = None
    if self.options.profile is not None:
      done = int(state.step)
      profile = loop.Profile(folder / "profile", *self.options.profile, done=done)
    try:
      state = loop.train(
        state,
        batches,
        train_step=jax.jit(self.program.train_step, donate_argnums=0),
        steps=run.steps,
        save_every=run.save_every,
        save=save,
        report=report,
        stop=self.stop,
        profile=profile,
      )
    except Diverged:
      summarised(report.step)
      raise
    finally:
      if profile is not None:
        profile.close()
      report.close()
      checkpoints.close()
      self._sent()
    trained = time.perf_counter()
    found = self._evaluated(state)
    begin += time.perf_counter() - trained  # evaluation is no part of the training
    summarised(
      run.steps,
      bits=found.bits,
      baselines=self.baselines,
      digests=checkpoint.digests(state.params),
    )
    self._sent()
    return Trained(run, state, found.bits)

  def _sent(self) -> None:
    """Brings the store up to the folder, where they are two."""
    self.where.send()
    self.where.wait()

  def _batches(self) -> Any:
    of = self.run.data
    return data.batches(
      data.Windows(self.encoded.train, seq=of.seq),
      batch=of.batch,
      seq=of.seq,
      seed=of.seed,
      num_workers=of.num_workers,
      temperature=of.temperature,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _summary(self, step: int, seconds: float, report: loop.Report, **end: Any):
    return summary(
      self.run,
      step=step,
      seconds=seconds,
      speeds=report.speeds,
      skipped=report.skipped,
      alarms=report.alarms.counts,
      data={"corpus": self.run.data.corpus, "digest": self.texts.digest},
      command=self.options.command,
      **end,
    )


def _started(run: Run, made: Program) -> states.TrainState:
  """The state before the first step; with another run's model if it says so."""
  state = made.init()
  if not run.start_from:
    return state
  saved = checkpoint.read(epath.Path(run.start_from) / "checkpoints")
  try:
    return states.restarted(
      state, saved.params, saved.balance, optimizer=made.optimizer
    )
  except ValueError as error:
    raise BadCheckpoint(str(error)) from error


def _seconds(folder: epath.Path) -> float:
  """Of earlier sittings."""
  path = folder / "summary.json"
  return json.loads(path.read_text())["seconds"] if path.exists() else 0.0


def _headline(run: Run) -> str:
  counted = cost.parameters(run.model)
  flops = 3 * cost.flops_per_token(run.model, seq=run.data.seq)
  return (
    f"{run.name}: {counted.total / 1e6:.2f}M parameters, {counted.active / 1e6:.2f}M "
    f"active, {flops / 1e6:.1f} MFLOP a trained token, on {jax.default_backend()}"
  )


def _sample(trained: Trained, words: vocabulary.Vocabulary) -> str:
  blueprint, _ = states.blueprint(trained.run.model)
  return sample.sample(
    trained.state.params,
    trained.state.balance,
    jax.random.key(trained.run.seed),
    blueprint=blueprint,
    vocabulary=words,
    prompt=trained.run.prompt,
    num_bytes=trained.run.sample_bytes,
  )
