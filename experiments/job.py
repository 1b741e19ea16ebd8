"""From checked runs and their folders to trained models and a table of how they did."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from pathlib import Path

from etils import epath

from experiments import (
  dataset,
  evaluate,
  optim,
  sample,
  state as states,
  tokens,
  vocabulary,
)
from experiments.config import Run
from experiments.errors import BadConfig
from experiments.remote import place
from experiments.signals import Stop
from experiments.sitting import Options, Sitting, Trained


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


def _sample(trained: Trained, words: vocabulary.Vocabulary) -> str:
  run = trained.run
  try:
    (made,) = sample.texts(
      trained.state.params,
      trained.state.balance,
      [run.prompt],
      model=run.model,
      vocabulary=words,
      tokens=run.sample_bytes,
      seed=run.seed,
    )
  except BadConfig as error:  # a model that cannot work from left to right
    return f"none: {error}"
  return made.prompt + made.text
