"""What a run has before its first step: facts, batches, a state, a clock.

For `experiments.sitting`, which trains one run, and `experiments.together`.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from experiments import calibration, checkpoint, data, dataset, state as states, tokens
from experiments.config import Run
from experiments.errors import BadCheckpoint, BadData
from experiments.program import Program
from experiments.spread import Spread
from jmoe.use import to_jsonable


def facts(run: Run, texts: dataset.Texts, encoded: tokens.Encoded) -> dict[str, Any]:
  """What must be as it was for a run to go on."""
  return {
    "config": to_jsonable(run),
    "text": texts.digest,
    "vocabulary": encoded.vocabulary.digest,
    "processes": run.data.readers or 1,  # what an earlier version called them
  }


def training_batches(
  run: Run, encoded: tokens.Encoded, readers: Sequence[int] | None = None
) -> data.Readers:
  """The batches of a run, from the first one on.

  Args:
    run: whose.
    encoded: its data.
    readers: of `data.readers`, those whose rows are wanted; None: all.

  Raises:
    BadData: `data.shares` names a domain that the corpus has not, or leaves nothing.
  """
  of = run.data
  shares = {
    calibration.number(encoded.domains, name, "data.shares"): share
    for name, share in of.shares or ()
  }
  windows, parts = data.Windows(encoded.train, seq=of.seq), of.readers or 1
  return data.Readers(
    {
      reader: data.batches(
        windows,
        batch=of.batch,
        seq=of.seq,
        seed=of.seed,
        num_workers=of.num_workers,
        temperature=of.temperature,
        fixed=shares,
        process_index=reader,
        process_count=parts,
      )
      for reader in (range(parts) if readers is None else readers)
    }
  )


def held_out_batches(run: Run, encoded: tokens.Encoded) -> Iterator[data.Batch]:
  """Every held-out token once."""
  of = run.data
  windows = data.Windows(encoded.held_out, seq=of.seq, context=of.eval_context)
  return data.one_pass(windows, batch=of.batch, seq=of.seq)


def started(
  run: Run, made: Program, encoded: tokens.Encoded, spread: Spread | None = None
) -> states.TrainState:
  """The state before the first step; with another run's model if it says so.

  Args:
    run: new.
    made: its program.
    encoded: its data.
    spread: over which mesh.

  Raises:
    BadCheckpoint: that run has another model or vocabulary, or none.
  """
  if not run.start_from:
    return made.init() if spread is None else spread.init(made)
  saved = checkpoint.read(epath.Path(run.start_from) / "checkpoints")
  words = encoded.vocabulary.digest
  if saved.facts.get("vocabulary", words) != words:
    raise BadCheckpoint(
      f"start_from={run.start_from!r}: that run has another vocabulary than "
      f"data.tokenizer={run.data.tokenizer!r} gives here; give its tokenizer."
    )
  try:
    state = states.restarted(
      made.init(), saved.params, saved.balance, optimizer=made.optimizer
    )
    return state if spread is None else spread.place(state)
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
