"""From checked runs and their folders to trained models and a table of how they did."""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
from etils import epath

from experiments import (
  checkpoint,
  dataset,
  evaluate,
  fitting,
  hosts,
  opening,
  optim,
  sample,
  state as states,
  tokens,
  vocabulary,
  workdir,
)
from experiments.config import Run
from experiments.digests import of_json
from experiments.errors import BadCheckpoint, BadConfig, Unreachable
from experiments.remote import place_of_job
from experiments.signals import Stop
from experiments.sitting import Options, Sitting, Trained


def loaded(
  run: Run, cache: Path, folder: epath.Path | None = None
) -> tuple[dataset.Texts, tokens.Encoded]:
  """The data of a run, built first if the cache does not hold it.

  Args:
    run: whose data; a model that starts from another's keeps that one's vocabulary.
    cache: of data sets.
    folder: of the run, which holds its vocabulary once it has begun.

  Raises:
    BadData: see `experiments.dataset` and `experiments.vocabulary`.
  """
  texts = dataset.load(cache, run.data)
  if run.start_from and run.data.tokenizer != "bytes":
    own = None if folder is None else folder / "vocabulary"
    start = workdir.opened(run.start_from, "start_from") / "vocabulary"
    # It reads like a Path, in an object store too.
    place = cast(Path, own if own is not None and own.exists() else start)
    words = vocabulary.load(place, run.data.tokenizer)
  else:
    words = vocabulary.of(run.data.tokenizer, cache, texts)
  return texts, tokens.load(cache, texts, words)


def check(
  runs: Sequence[tuple[Run, epath.Path]], options: Options | None = None
) -> None:
  """Whether optimizers and meshes fit models and starts are there, before any data.

  Raises:
    BadConfig: an optimizer or a mesh does not fit.
    BadCheckpoint: a new run would start from a folder without checkpoints.
    Unreachable: an object store cannot be read.
  """
  for run, folder in runs:
    try:
      _check_start(run, folder)
      if options is not None:
        fitting.of(run, options.mesh, strategy=options.strategy)
      _, shapes = states.blueprint(run.model, run.param_dtype)
      optim.optimizer(run.optim, steps=run.steps, params=shapes)
    except (BadCheckpoint, Unreachable):
      raise
    except ValueError as error:
      raise BadConfig(str(error)) from error


def _check_start(run: Run, folder: epath.Path) -> None:
  """A run that has begun needs what it started from no more."""
  if not run.start_from:
    return
  start = workdir.opened(run.start_from, "start_from") / "checkpoints"
  with workdir.reaching(folder):
    begun = (folder / "config.json").exists()
  with workdir.reaching(start):
    if not begun and not start.is_dir():
      raise BadCheckpoint(
        f"start_from={run.start_from!r}: {start} holds no checkpoint; give the folder "
        "of a run."
      )


def execute(runs: Sequence[tuple[Run, epath.Path]], options: Options) -> None:
  """Trains each run in its folder, or goes on with it, and prints how well it did.

  Raises:
    BadConfig, BadData, BadCheckpoint, Diverged, Stopped: see there.
  """
  with hosts.together("the runs"):
    check(runs, options)
    _check_processes(runs)
  run, folder = runs[0]
  texts, encoded = hosts.first("the data", lambda: loaded(run, options.cache, folder))
  with hosts.together("what is trained on what"):
    facts = opening.facts(run, texts, encoded)
    # By the argument that says it, where one does.
    names = {"config": "the configuration (--config, --set)"}
    same = {names.get(name, name): of_json(fact) for name, fact in facts.items()}
    hosts.check_equal(
      same | {"--mesh": options.mesh, "--strategy": options.strategy},
      "give every process the same command and data, and Pythons of one version.",
    )
  held_out = list(texts.held_out)
  baselines = {}
  if hosts.is_first():
    baselines = {
      "gzip -9": evaluate.gzip_bits(held_out, texts.domains, alone=False),
      "gzip -9, each alone": evaluate.gzip_bits(held_out, texts.domains, alone=True),
    }
  with Stop() if hosts.count() == 1 else hosts.SharedStop() as stop:
    finished = []
    for run, folder in runs:
      with place_of_job(folder) as where:
        sitting = Sitting(
          run,
          where,
          texts,
          encoded,
          baselines=baselines,
          options=options,
          stop=stop,
        )
        finished.append(sitting.finished())
  if not hosts.is_first():
    return
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
    made = _sample(trained, encoded.vocabulary, runs[0][1])
    print(f"\nsample of {trained.run.name}:\n{made}")


def _check_processes(runs: Sequence[tuple[Run, epath.Path]]) -> None:
  """What several processes would do twice."""
  if hosts.count() == 1:
    return
  for run, _ in runs:
    if (run.data.readers or 1) % hosts.count() and hosts.is_first():
      print(
        f"note: data.readers={run.data.readers} for {hosts.count()} processes: some "
        f"read the same data; --set data.readers={hosts.count()} gives each its share.",
        file=sys.stderr,
      )


def _sample(trained: Trained, words: vocabulary.Vocabulary, folder: epath.Path) -> str:
  run, state = trained.run, trained.state
  arrays: tuple[Any, Any] = (state.params, state.balance)
  if hosts.count() > 1:  # this process has no more than its part
    saved = checkpoint.read(folder / "checkpoints")
    arrays = saved.params, saved.balance
  elif len(state.step.devices()) > 1:
    arrays = jax.device_get(arrays)
  try:
    (made,) = sample.texts(
      *arrays,
      [run.prompt],
      model=run.model,
      vocabulary=words,
      tokens=run.sample_bytes,
      seed=run.seed,
    )
  except BadConfig as error:  # a model that cannot work from left to right
    return f"none: {error}"
  return made.prompt + made.text
