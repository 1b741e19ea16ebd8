"""Bits per byte on held-out documents, of a model and of gzip."""
# SPDX-License-Identifier: Apache-2.0

import gzip
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import Batch

Bits = Mapping[str, float]  # domain, or "all", -> bits per byte


class Evaluation(NamedTuple):
  """One pass over the held-out documents."""

  bits: Bits
  loads: tuple[np.ndarray, ...]  # i64[R,domains,E] of each stack of sparse layers


def evaluation(
  eval_step: Callable[[Batch], tuple[Any, Any, Sequence[Any]]],
  batches: Iterable[Batch],
  sizes: Mapping[str, int],
  domains: Sequence[str],
) -> Evaluation:
  """Bits per byte of text; the ends of documents are paid for, but not counted.

  Args:
    eval_step: batch -> sums by domain of nats, of bytes and of experts' loads.
    batches: one pass.
    sizes: bytes of each domain, as the documents themselves have them.
    domains: names of the numbers in `domain`.

  Raises:
    ValueError: the pass did not score every byte exactly once.
  """
  nats, counts = np.zeros(len(domains)), np.zeros(len(domains), np.int64)
  loads: list[np.ndarray] = []
  for batch in batches:
    some_nats, some_counts, some_loads = eval_step(batch)
    nats += np.asarray(some_nats, np.float64)
    counts += np.asarray(some_counts)
    wide = [np.asarray(load, np.int64) for load in some_loads]
    loads = [a + b for a, b in zip(loads, wide, strict=True)] if loads else wide
  for domain, count in zip(domains, counts, strict=True):
    if count != sizes.get(domain, 0):
      raise ValueError(
        f"evaluation scored {count} bytes of {domain}, which has "
        f"{sizes.get(domain, 0)}; report this."
      )
  bits = nats / math.log(2)
  found = {d: bits[n] / counts[n] for n, d in enumerate(domains) if counts[n]}
  return Evaluation(found | {"all": bits.sum() / counts.sum()}, tuple(loads))


def domain_sizes(documents: Sequence[Any], domains: Sequence[str]) -> dict[str, int]:
  """UTF-8 bytes of the documents of each domain, and of all; without prompts."""
  sizes = dict.fromkeys(domains, 0)
  for document in documents:
    sizes[domains[int(document["domain"])]] += len(_scored(document))
  return {d: n for d, n in sizes.items() if n} | {"all": sum(sizes.values())}


def gzip_bits(documents: Sequence[Any], domains: Sequence[str], *, alone: bool) -> Bits:
  """Bits per byte of `gzip -9`; prompts are neither counted nor shown to it.

  Args:
    documents: records with `text`, `domain` and perhaps `unscored`.
    domains: names of the numbers in `domain`.
    alone: each document by itself, as one file; otherwise all of a domain in one file,
      so that later documents profit from earlier ones (the harder comparison).
  """
  texts: dict[str, list[bytes]] = {d: [] for d in domains}
  for document in documents:
    texts[domains[int(document["domain"])]].append(_scored(document))
  packed = {
    d: sum(len(gzip.compress(t, 9)) for t in (ts if alone else [b"".join(ts)]))
    for d, ts in texts.items()
    if ts
  }
  packed["all"] = sum(packed.values())
  sizes = domain_sizes(documents, domains)
  return {d: 8 * packed[d] / n for d, n in sizes.items()}


def _scored(document: Any) -> bytes:
  return document["text"][int(document.get("unscored", 0)) :]
