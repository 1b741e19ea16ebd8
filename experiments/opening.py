"""What a run has before its first step: facts, batches, a state, a clock.

For `experiments.sitting`, which trains one run, and `experiments.together`.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
from etils import epath

from experiments import checkpoint, data, dataset, state as states, tokens
from experiments.config import Run
from experiments.errors import BadCheckpoint, BadData
from experiments.program import Program
from jmoe.use import to_jsonable


def facts(run: Run, texts: dataset.Texts, encoded: tokens.Encoded) -> dict[str, Any]:
  """What must be as it was for a run to go on."""
  return {
    "config": to_jsonable(run),
    "text": texts.digest,
    "vocabulary": encoded.vocabulary.digest,
    "processes": jax.process_count(),  # the order of batches depends on their number
  }


def training_batches(run: Run, encoded: tokens.Encoded) -> grain.DatasetIterator:
  """This process's share of the batches of a run, from the first one on."""
  of = run.data
  return data.batches(
    data.Windows(encoded.train, seq=of.seq),
    batch=of.batch,
    seq=of.seq,
    seed=of.seed,
    num_workers=of.num_workers,
    temperature=of.temperature,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def held_out_batches(run: Run, encoded: tokens.Encoded) -> Iterator[data.Batch]:
  """Every held-out token once."""
  of = run.data
  windows = data.Windows(encoded.held_out, seq=of.seq, context=of.eval_context)
  return data.one_pass(windows, batch=of.batch, seq=of.seq)


def started(run: Run, made: Program, encoded: tokens.Encoded) -> states.TrainState:
  """The state before the first step; with another run's model if it says so.

  Raises:
    BadCheckpoint: that run has another model or vocabulary, or none.
  """
  if not run.start_from:
    return made.init()
  saved = checkpoint.read(epath.Path(run.start_from) / "checkpoints")
  words = encoded.vocabulary.digest
  if saved.facts.get("vocabulary", words) != words:
    raise BadCheckpoint(
      f"start_from={run.start_from!r}: that run has another vocabulary than "
      f"data.tokenizer={run.data.tokenizer!r} gives here; give its tokenizer."
    )
  try:
    return states.restarted(
      made.init(), saved.params, saved.balance, optimizer=made.optimizer
    )
  except ValueError as error:
    raise BadCheckpoint(str(error)) from error


class Clock:
  """Seconds of training, those of earlier sittings included."""

  def __init__(self, folder: epath.Path):
    path = folder / "summary.json"
    try:
      self._before = float(json.loads(path.read_bytes())["seconds"])
    except FileNotFoundError:
      self._before = 0.0
    except (ValueError, KeyError, TypeError):
      raise BadData(f"{path} is not the summary of a run; remove it.") from None
    self._begin, self._end = time.perf_counter(), None

  def close(self) -> None:
    """What follows is no training."""
    self._end = time.perf_counter()

  def seconds(self) -> float:
    now = time.perf_counter() if self._end is None else self._end
    return self._before + now - self._begin
