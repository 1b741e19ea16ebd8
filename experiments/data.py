"""Batches of packed documents: deterministic iterators whose state can be saved.

Documents are cut into windows, shuffled, packed into rows by first fit (Grain) and
batched.  Every token, and the end of its document, is predicted exactly once a pass,
from the token before it.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from experiments.batches import FEATURES, Batch
from experiments.errors import BadData
from experiments.proportions import LEAST, shares as shares
from experiments.tokens import Tokens

_FEW = 1 << 10  # windows


class Windows:
  """Random access to all windows of all documents, in order.

  Window n of a document holds the targets [n*stride, (n+1)*stride) and up to
  `context` tokens before them, which are inputs but not scored; a prompt is not either.

  Args:
    documents: as tokens.
    seq: tokens of a window at most.
    context: tokens of it that are not scored; 0 in training.
  """

  def __init__(self, documents: Tokens, *, seq: int, context: int = 0):
    self._documents = documents
    self._context = context
    self._stride = seq - context
    # Targets of a document: all but its begin.
    lengths = np.diff(documents.ends, prepend=0) - 1
    self._lengths = lengths
    self._counts = -(-lengths // self._stride)
    self._ends = np.cumsum(self._counts)

  @property
  def tokens_by_domain(self) -> np.ndarray:
    """i64[domains] targets, those of prompts included."""
    return _sums(self._documents.domain, self._lengths)

  @property
  def windows_by_domain(self) -> np.ndarray:
    """i64[domains] windows."""
    return _sums(self._documents.domain, self._counts)

  def of(self, domain: int) -> "OfDomain":
    """The windows of one domain, in order."""
    (chosen,) = np.nonzero(np.repeat(self._documents.domain, self._counts) == domain)
    return OfDomain(self, chosen)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> Batch:
    """i32[n] features of one window, n <= seq."""
    number = int(np.searchsorted(self._ends, index, side="right"))
    window = int(index - (self._ends[number - 1] if number else 0))
    documents = self._documents
    begin = int(documents.ends[number - 1]) if number else 0
    last = int(documents.ends[number]) - begin - 1
    first = window * self._stride
    start = max(0, first - self._context)
    end = min(first + self._stride, last)
    tokens = documents.tokens[begin + start : begin + end + 1].astype(np.int32)
    scored = np.zeros(end - start, np.int32)
    scored[max(first, int(documents.unscored[number])) - start :] = 1
    return {
      "inputs": tokens[:-1],
      "targets": tokens[1:],
      "scored": scored,
      "domain": np.full(end - start, documents.domain[number], np.int32),
    }


class OfDomain:
  """Some of the windows."""

  def __init__(self, windows: "Windows | OfDomain", chosen: np.ndarray):
    self._windows, self._chosen = windows, chosen

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Batch:
    """As of `Windows`."""
    return self._windows[int(self._chosen[index])]


def batches(
  windows: Windows,
  *,
  batch: int,
  seq: int,
  seed: int,
  num_workers: int = 0,
  temperature: float = 1.0,
  fixed: Mapping[int, float] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless training batches.

  Every value is i32[B,S]: `inputs`, `targets`, `scored` (0 or 1), `domain`, `segment`
  (from 1 within a row; 0 is padding) and `position` (within the window).

  Args:
    windows: what to draw from.
    batch: rows, of all processes together.
    seq: tokens of a row.
    seed: of the order; every epoch has its own.
    num_workers: processes that pack; the order depends on it, 0 packs in this one.
    temperature: 1 draws each window once an epoch; otherwise tokens of a domain are
      drawn in proportion to their number ** (1/temperature), each window of it once an
      epoch of the domain.
    fixed: see `shares`; windows are drawn by domain then too.
    process_index: which part of the windows and rows to give.
    process_count: parts; no window is in two of them.

  Returns:
    An iterator with `get_state()` and `set_state(state)`.

  Raises:
    ValueError: the rows cannot be divided among the processes.
    BadData: a temperature that leaves nothing of a domain, or shares that leave none.
  """
  if batch % process_count:
    raise ValueError(
      f"data.batch={batch} is not divisible by the {process_count} processes; give a "
      f"multiple of {process_count}."
    )
  rows = batch // process_count
  part = slice(process_index, None, process_count)
  order = _order(windows, temperature, fixed or {}, seed, part)
  dataset = _packed(order, batch=rows, seq=seq)
  dataset = dataset.batch(rows, drop_remainder=True).map(_renamed)
  if num_workers:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers)
    dataset = dataset.mp_prefetch(options, functools.partial(_worker, os.getpid()))
  return iter(dataset)


class Readers(Iterator[Batch]):
  """Some of the streams of a batch side by side: their rows, one stream after another.

  Args:
    streams: by number, of `batches` with as many parts as there are streams.
  """

  def __init__(self, streams: Mapping[int, grain.DatasetIterator]):
    self._streams = dict(sorted(streams.items()))

  def __next__(self) -> Batch:
    each = [next(stream) for stream in self._streams.values()]
    if len(each) == 1:
      return each[0]
    return {name: np.concatenate([one[name] for one in each]) for name in each[0]}

  def get_state(self) -> dict[str, Any]:
    """Number of a stream -> its state, which JSON can hold."""
    return {str(n): stream.get_state() for n, stream in self._streams.items()}

  def set_state(self, states: Mapping[str, Any]) -> None:
    """Goes to where all streams of a batch were, which may be more than these.

    Raises:
      KeyError: a stream is not among them.
    """
    for number, stream in self._streams.items():
      stream.set_state(states[str(number)])
      stream.start_prefetch()


def _worker(parent: int, index: int, count: int) -> None:
  """A worker leaves Ctrl-C to the run, and ends when the run is killed."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1.0)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _order(
  windows: Windows,
  temperature: float,
  fixed: Mapping[int, float],
  seed: int,
  part: slice,
) -> grain.MapDataset:
  """Windows without end, those of one process."""
  if temperature == 1 and not fixed:
    return _epochs(windows, seed)[part]
  counts = windows.windows_by_domain
  wanted = shares(windows, temperature, fixed)
  left_out = wanted == 0 if fixed else np.zeros_like(counts, bool)
  (present,) = np.nonzero((counts > 0) & ~left_out)
  # Windows are what is drawn, and tokens what is promised.
  lengths = windows.tokens_by_domain[present] / counts[present]
  drawn = wanted[present]
  if drawn.min() < LEAST:
    raise BadData(
      f"data.temperature={temperature} leaves a domain {drawn.min():.1e} of the "
      "tokens, so that it is never drawn; give a temperature nearer to 1, or leave out "
      "the domain."
    )
  domains = [_epochs(windows.of(d), seed)[part] for d in present.tolist()]
  return grain.MapDataset.mix(domains, (drawn / lengths).tolist())


def _epochs(windows: Windows | OfDomain, seed: int) -> grain.MapDataset:
  """Every window once an epoch, without end."""
  if len(windows) < _FEW:
    return grain.MapDataset.source(_FewWindows(windows, seed))
  return grain.MapDataset.source(windows).seed(seed).shuffle().repeat()


class _FewWindows:
  """What grain's shuffle and repeat are, which take milliseconds where few are drawn.

  (Its shuffle walks through numbers of 16 bits until one is a place.)
  """

  def __init__(self, windows: Windows | OfDomain, seed: int):
    self._windows, self._seed = windows, seed
    self._epoch, self._places = -1, np.zeros(0, np.int64)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Batch:
    """As of `Windows`."""
    epoch, place = divmod(int(index), len(self._windows))
    if epoch != self._epoch:
      # Raw bits are the same in every version of NumPy; draws need not be.
      bits = np.random.PCG64([self._seed, epoch]).random_raw(len(self._windows))
      self._epoch, self._places = epoch, np.argsort(bits, kind="stable")
    return self._windows[int(self._places[place])]


def one_pass(windows: Windows | OfDomain, *, batch: int, seq: int) -> Iterator[Batch]:
  """Every window once, in order; the last batch is filled up with padding."""
  dataset = _packed(grain.MapDataset.source(windows), batch=batch, seq=seq)
  fill = functools.partial(grain.experimental.batch_and_pad, batch_size=batch)
  return iter(dataset.batch(batch, batch_fn=fill).map(_renamed))


def _packed(order: grain.MapDataset, *, batch: int, seq: int) -> grain.IterDataset:
  # No reading ahead: packing costs milliseconds, and the state stays small.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return grain.experimental.FirstFitPackIterDataset(
    order.to_iter_dataset(options),
    length_struct=dict.fromkeys(FEATURES, seq),
    num_packing_bins=4 * batch,
  )


def _renamed(packed: Batch) -> Batch:
  return {name: packed[name] for name in FEATURES} | {
    "segment": packed["inputs_segment_ids"],
    "position": packed["inputs_positions"],
  }


def _sums(domain: np.ndarray, of: np.ndarray) -> np.ndarray:
  found = np.zeros(int(domain.max(initial=-1)) + 1, np.int64)
  np.add.at(found, domain, of)
  return found
