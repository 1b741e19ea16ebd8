"""What is known about a data set: origin, counts, digest and what was left out."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from experiments.corpora import Choice, Document, digest

_PACKAGES = (
  *("array_record", "datasketch", "grain", "numpy", "tensorflow-datasets"),
  "tokenizers",
)


def manifest(
  documents: Sequence[Document], facts: dict[str, Any], choice: Choice
) -> dict[str, Any]:
  """JSON about documents.

  Args:
    documents: each on a side.
    facts: of their corpus, taken over as they are.
    choice: that they are of.
  """
  counts: dict[str, dict[str, dict[str, int]]] = {}
  for doc in documents:
    sides = counts.setdefault(doc.domain, {})
    for side in ("train", "held_out"):
      sides.setdefault(side, {"documents": 0, "bytes": 0})
    side = sides["held_out" if doc.held_out else "train"]
    side["documents"] += 1
    side["bytes"] += len(doc.text.encode())
  return {
    "corpus": choice.corpus,
    "max_bytes": choice.max_bytes,
    "near_duplicates": choice.near_duplicates,
    "packages": dict(_installed()),
    **facts,
    "domains": counts,
    "digest": digest(documents),
    "sha256": {
      side: digest(
        [doc for doc in documents if bool(doc.held_out) == (side != "train")]
      )
      for side in ("train", "held_out")
    },
  }


def _installed() -> Iterator[tuple[str, str]]:
  """(package, version) of what data is made with, where it is installed."""
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      yield name, metadata.version(name)
