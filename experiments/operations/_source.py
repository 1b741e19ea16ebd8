"""What an operation reads of a run, and what it hands back."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from experiments import data, dataset, opening, recorded, tokens
from jmoe import surgery

_MASTER = "master/"
_LOGITS = 1 << 26  # of the sample on which outputs are compared


class Outcome(NamedTuple):
  """What an operation made."""

  model: surgery.Model
  kept: Sequence[Any]  # as of `surgery.receipt`
  notes: Mapping[str, Any] = {}  # for the receipt, ready for JSON
  settings: Sequence[str] = ()  # of the new run, as by `--set`, which goes after them
  # What becomes of a tree of moments, as `surgery.moments` takes it; or why nothing.
  moments: Callable[[surgery.Model], surgery.Model] | str = (
    "the new weights are no copies of trained ones"
  )
  # Of each sparse layer, the old number of each new expert; None: they have none.
  origins: Sequence[Sequence[int]] | None = None


class Source:
  """A run's newest whole checkpoint and its data; its folder is only read.

  Args:
    folder: of the run.
    cache: of data sets.
    step: of the checkpoint; None: the newest.
    argument: that gave the folder, for messages.

  Raises:
    BadCheckpoint, BadData, Unreachable: see `experiments.recorded`.
  """

  def __init__(
    self,
    folder: epath.Path,
    cache: Path,
    step: int | None = None,
    argument: str = "--workdir",
  ):
    self.folder, self._cache = folder, cache
    self.run, self.words, self.saved = recorded.read(folder, step, argument)
    self.step = self.saved.step
    full = self.saved.optimizer.items()  # float32 copies of what is stored in less
    master = {n.removeprefix(_MASTER): x for n, x in full if n.startswith(_MASTER)}
    params = self.saved.params | master
    self.model = surgery.Model(self.run.model, params, self.saved.balance)

  @functools.cached_property
  def texts(self) -> dataset.Texts:
    """The data set, built first if the cache does not hold it."""
    return dataset.load(self._cache, self.run.data)

  @functools.cached_property
  def encoded(self) -> tokens.Encoded:
    """The same as tokens of the run's own vocabulary."""
    return tokens.load(self._cache, self.texts, self.words)

  def sample(self) -> surgery.Sample:
    """Rows of held-out text, the same at every call."""
    batch = next(iter(opening.held_out_batches(self.run, self.encoded)))
    each = self.run.data.seq * self.run.model.vocab_size
    return sample_of(batch, rows=max(1, _LOGITS // each))


def sample_of(batch: data.Batch, rows: int) -> surgery.Sample:
  """Some rows of a batch."""
  parts = (batch[name][:rows] for name in ("inputs", "segment", "position"))
  return surgery.Sample(*parts)
