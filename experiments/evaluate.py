"""Bits per byte on held-out documents, of a model and of gzip."""
# SPDX-License-Identifier: Apache-2.0

import gzip
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.corpus import DOMAINS
from experiments.data import Batch

Bits = Mapping[str, float]  # domain, or "all", -> bits per byte


def model_bits(
  eval_step: Callable[[Batch], tuple[Any, Any]],
  batches: Iterable[Batch],
  sizes: Mapping[str, int],
) -> Bits:
  """Bits per byte of text; the ends of documents are paid for, but not counted.

  Args:
    eval_step: batch -> sums by domain of nats and of bytes.
    batches: one pass.
    sizes: bytes of each domain, as the documents themselves have them.

  Raises:
    ValueError: the pass did not score every byte exactly once.
  """
  nats, counts = np.zeros(len(DOMAINS)), np.zeros(len(DOMAINS), np.int64)
  for batch in batches:
    some_nats, some_counts = eval_step(batch)
    nats += np.asarray(some_nats, np.float64)
    counts += np.asarray(some_counts)
  for domain, count in zip(DOMAINS, counts, strict=True):
    if count != sizes.get(domain, 0):
      raise ValueError(
        f"evaluation scored {count} bytes of {domain}, which has "
        f"{sizes.get(domain, 0)}; report this."
      )
  bits = nats / math.log(2)
  found = {d: bits[n] / counts[n] for n, d in enumerate(DOMAINS) if counts[n]}
  return found | {"all": bits.sum() / counts.sum()}


def domain_sizes(documents: Sequence[Any]) -> dict[str, int]:
  """UTF-8 bytes of the documents of each domain, and of all."""
  sizes = dict.fromkeys(DOMAINS, 0)
  for document in documents:
    sizes[DOMAINS[document["domain"]]] += len(document["text"])
  return {d: n for d, n in sizes.items() if n} | {"all": sum(sizes.values())}


def gzip_bits(documents: Sequence[Any], *, alone: bool) -> Bits:
  """Bits per byte of `gzip -9`.

  Args:
    documents: records with `text` and `domain`.
    alone: each document by itself, as one file; otherwise all of a domain in one file,
      so that later documents profit from earlier ones (the harder comparison).
  """
  texts: dict[str, list[bytes]] = {d: [] for d in DOMAINS}
  for document in documents:
    texts[DOMAINS[document["domain"]]].append(document["text"])
  packed = {
    d: sum(len(gzip.compress(t, 9)) for t in (ts if alone else [b"".join(ts)]))
    for d, ts in texts.items()
    if ts
  }
  packed["all"] = sum(packed.values())
  return {d: 8 * packed[d] / n for d, n in domain_sizes(documents).items()}
