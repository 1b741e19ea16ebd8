"""A trained model from the folder of its run, which is only read."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import cast

from etils import epath

from experiments import checkpoint, state as states, vocabulary
from experiments.config import Run
from experiments.errors import BadCheckpoint, BadData
from experiments.workdir import reaching
from jmoe.use import from_jsonable


def config(folder: epath.Path, argument: str = "--workdir") -> Run:
  """The run of a folder.

  Args:
    folder: of a run.
    argument: that gave it, for messages.

  Raises:
    BadData: it is not the folder of a run, or its config cannot be read.
    Unreachable: an object store cannot be read.
  """
  with reaching(folder):
    there = folder.exists()
    text = _text(folder / "config.json") if there and folder.is_dir() else None
  if not there:
    raise BadData(f"{argument} {folder}: there is no such folder; give that of a run.")
  if text is None:
    raise BadData(
      f"{argument} {folder} holds no run: config.json is missing; give that of a run."
    )
  return _run(folder, text)


def read(
  folder: epath.Path, step: int | None = None, argument: str = "--workdir"
) -> tuple[Run, vocabulary.Vocabulary, checkpoint.Saved]:
  """(the run, its vocabulary, its newest whole checkpoint or that of a step).

  `argument` gave the folder, for messages.

  Raises:
    BadData: it is not the folder of a run, or its config or vocabulary cannot be read.
    BadCheckpoint: there is no whole checkpoint, or it is of another model.
    Unreachable: an object store cannot be read.
  """
  run = config(folder, argument)
  # It reads like one, in an object store too.
  place = cast(Path, folder / "vocabulary")
  words = vocabulary.load(place, run.data.tokenizer)
  if words.size > run.model.vocab_size:
    raise BadData(
      f"{place} has {words.size} tokens, the model "
      f"{run.model.vocab_size}; copy it from where the run was trained."
    )
  saved = checkpoint.read(folder / "checkpoints", step)
  _check(folder, run, saved)
  return run, words, saved


def _text(path: epath.Path) -> str | None:
  return path.read_text() if path.exists() else None


def _run(folder: epath.Path, text: str) -> Run:
  path = folder / "config.json"
  try:
    # A run's functions may be the user's own, in the checkout's packages.
    run = from_jsonable(json.loads(text), allow=("experiments",))
  except (ValueError, TypeError, RecursionError) as error:
    raise BadData(f"{path} is no config of a run: {error}") from error
  if not isinstance(run, Run):
    raise BadData(f"{path} is no config of a run; give the --workdir of one.")
  return run


def _check(folder: epath.Path, run: Run, saved: checkpoint.Saved) -> None:
  """Raises unless the checkpoint is of the config's model."""
  made, shapes = states.blueprint(run.model, run.param_dtype)
  expected = {name: tuple(x.shape) for name, x in shapes.items()}
  found = {name: tuple(x.shape) for name, x in saved.params.items()}
  if expected != found or made.balance.num_leaves != len(saved.balance):
    wrong = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
    raise BadCheckpoint(
      f"checkpoint {folder / 'checkpoints' / str(saved.step)} is of another model than "
      f"{folder / 'config.json'} ({(wrong or ['balance'])[0]} differs); restore the "
      "config that it was trained with."
    )
