"""Batches of packed documents: deterministic iterators whose state can be saved.

Documents are cut into windows, shuffled, packed into rows by first fit (Grain) and
batched.  Bytes are the vocabulary; every byte, and the end of its document, is
predicted exactly once a pass, from the token before it.
"""
# SPDX-License-Identifier: Apache-2.0

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from experiments.vocabulary import encode

Batch = dict[str, np.ndarray]  # i32[B,S] each: see `batches`
_FEATURES = ("inputs", "targets", "scored", "domain")


class Windows:
  """Random access to all windows of all documents, in order.

  Window n of a document holds the targets [n*stride, (n+1)*stride) and up to
  `context` tokens before them, which are inputs but not scored.

  Args:
    documents: records with `text` (UTF-8 bytes) and `domain`.
    seq: tokens of a window at most.
    context: tokens of it that are not scored; 0 in training.
  """

  def __init__(self, documents: Sequence[Any], *, seq: int, context: int = 0):
    self._documents = documents
    self._context = context
    self._stride = seq - context
    # Targets of a document: its bytes and EOS.
    lengths = [len(d["text"]) + 1 for d in documents]
    self.num_bytes = sum(lengths) - len(lengths)
    counts = [-(-length // self._stride) for length in lengths]
    self._ends = np.cumsum(counts).tolist()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> Batch:
    """i32[n] features of one window, n <= seq."""
    number = bisect.bisect_right(self._ends, index)
    window = index - (self._ends[number - 1] if number else 0)
    document = self._documents[number]
    tokens = encode(document["text"])
    first = window * self._stride
    start = max(0, first - self._context)
    end = min(first + self._stride, len(tokens) - 1)
    targets = tokens[start + 1 : end + 1]
    return {
      "inputs": tokens[start:end],
      "targets": targets,
      "scored": (np.arange(start, end) >= first).astype(np.int32),
      "domain": np.full_like(targets, document["domain"]),
    }


def batches(
  windows: Windows, *, batch: int, seq: int, seed: int, num_workers: int = 0
) -> grain.DatasetIterator:
  """Endless training batches.

  Every value is i32[B,S]: `inputs`, `targets`, `scored` (0 or 1), `domain`, `segment`
  (from 1 within a row; 0 is padding) and `position` (within the window).

  Args:
    windows: what to draw from, each once an epoch.
    batch: rows.
    seq: tokens of a row.
    seed: of the order; every epoch has its own.
    num_workers: processes that pack; the order depends on it, 0 packs in this one.

  Returns:
    An iterator with `get_state()` and `set_state(state)`.
  """
  order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
  dataset = _packed(order, batch=batch, seq=seq)
  dataset = dataset.batch(batch, drop_remainder=True).map(_renamed)
  if num_workers:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers))
  return iter(dataset)


def one_pass(windows: Windows, *, batch: int, seq: int) -> Iterator[Batch]:
  """Every window once, in order; the last batch is filled up with padding."""
  dataset = _packed(grain.MapDataset.source(windows), batch=batch, seq=seq)
  fill = functools.partial(grain.experimental.batch_and_pad, batch_size=batch)
  return iter(dataset.batch(batch, batch_fn=fill).map(_renamed))


def _packed(order: grain.MapDataset, *, batch: int, seq: int) -> grain.IterDataset:
  # No reading ahead: packing costs milliseconds, and the state stays small.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return grain.experimental.FirstFitPackIterDataset(
    order.to_iter_dataset(options),
    length_struct=dict.fromkeys(_FEATURES, seq),
    num_packing_bins=4 * batch,
  )


def _renamed(packed: Batch) -> Batch:
  return {name: packed[name] for name in _FEATURES} | {
    "segment": packed["inputs_segment_ids"],
    "position": packed["inputs_positions"],
  }
