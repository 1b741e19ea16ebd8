"""Leaves out documents that nearly repeat an earlier one.

Candidates come from MinHash and locality-sensitive hashing (Broder 1997, "On the
resemblance and containment of documents"; the `datasketch` package), and are compared
exactly: nothing is left out that is not as similar as asked, and of what is, not one in
a thousand stays (from a similarity of 0.06 on; there are not enough hashes for less).
"""
# SPDX-License-Identifier: Apache-2.0

import re
import zlib
from collections.abc import Sequence

from experiments import extras
from experiments.corpora.types import Document

_PERMUTATIONS = 128
_MISSED = 1e-3  # of the pairs that are as similar as asked
_WORDS = 5  # of a shingle
# A sign of a script without spaces counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")


def removed(
  documents: Sequence[Document], similarity: float
) -> tuple[list[Document], dict[str, int]]:
  """(documents without near-duplicates, how many were left out by domain).

  The first of those that resemble each other stays, so the outcome depends on the order
  and on nothing else.

  Args:
    documents: sorted.
    similarity: from 0 to 1; Jaccard, of the sets of five successive words, from which
      on the later of two documents is left out.

  Raises:
    MissingExtra: datasketch is not installed.
  """
  datasketch = extras.require("datasketch", "data", needed_by="data.near_duplicates")
  index = datasketch.MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(similarity))
  kept: list[Document] = []
  sets: list[frozenset[int]] = []
  counts: dict[str, int] = {}
  for doc in documents:
    some = shingles(doc.text)
    sketch = datasketch.MinHash(num_perm=_PERMUTATIONS, hashfunc=_itself)
    sketch.update_batch(some)
    if any(jaccard(some, sets[n]) >= similarity for n in index.query(sketch)):
      counts[doc.domain] = counts.get(doc.domain, 0) + 1
      continue
    index.insert(len(kept), sketch)
    kept.append(doc)
    sets.append(some)
  return kept, counts


def _bands(similarity: float) -> tuple[int, int]:
  """(bands, hashes of each): two documents are compared if they agree in a band.

  As many hashes of a band, and so as few comparisons, as miss few enough.
  """
  for hashes in range(_PERMUTATIONS // 2, 0, -1):
    bands = _PERMUTATIONS // hashes
    if (1 - similarity**hashes) ** bands <= _MISSED:
      return bands, hashes
  return _PERMUTATIONS, 1


def shingles(text: str) -> frozenset[int]:
  """32-bit hashes of all runs of five words; of the whole text if it has fewer."""
  words = _WORD.findall(text.lower()) or [text]
  runs = range(max(1, len(words) - _WORDS + 1))
  return frozenset(zlib.crc32(" ".join(words[n : n + _WORDS]).encode()) for n in runs)


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
  """Size of the intersection over that of the union."""
  return len(a & b) / len(a | b)


def _itself(value: int) -> int:
  return value
