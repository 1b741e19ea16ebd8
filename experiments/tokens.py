"""Documents as tokens in flat arrays on disk, so that a window of one is a slice.

Encoded once for a data set and a vocabulary; files are mapped into memory, which the
workers of a pipeline share.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.dataset import SPLITS, Texts
from experiments.errors import BadData
from experiments.vocabulary import Vocabulary
from experiments.whole import whole


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Documents end to end, each with its begin and its end."""

  tokens: np.ndarray  # u16 or i32[N]
  ends: np.ndarray  # i64[documents]  where each document ends in `tokens`
  domain: np.ndarray  # i32[documents]
  unscored: np.ndarray  # i32[documents]  leading tokens, after the begin, without loss
  folder: Path | None = None  # where they are mapped from

  def __reduce__(self):
    # A mapped file goes to another process as its name, not as its content.
    if self.folder is not None:
      return _opened, (self.folder,)
    return Tokens, (self.tokens, self.ends, self.domain, self.unscored)


class Encoded(NamedTuple):
  """Both splits of a data set."""

  train: Tokens
  held_out: Tokens
  vocabulary: Vocabulary
  domains: tuple[str, ...] = ()  # names of the numbers in `Tokens.domain`


def encoded(documents: Iterable[Any], vocabulary: Vocabulary) -> Tokens:
  """Tokens of records with `text`, `domain` and perhaps `unscored`, in memory.

  A prompt is encoded by itself, so that no token is half scored.
  """
  # Each piece is made small at once: all are held until they are joined.
  kind = np.uint16 if vocabulary.size <= 1 << 16 else np.int32
  pieces, domains, unscored = [np.zeros(0, kind)], [], []
  for record in documents:
    text, prompt = record["text"], int(record.get("unscored", 0))
    tokens, before = vocabulary.encode(text[prompt:]), 0
    if prompt:
      first = vocabulary.encode(text[:prompt])
      tokens, before = np.concatenate([first[:-1], tokens[1:]]), len(first) - 2
    pieces.append(tokens.astype(kind))
    domains.append(int(record["domain"]))
    unscored.append(before)
  return Tokens(
    np.concatenate(pieces),
    np.cumsum([len(piece) for piece in pieces[1:]], dtype=np.int64),
    np.array(domains, np.int32),
    np.array(unscored, np.int32),
  )


def load(cache: Path, texts: Texts, vocabulary: Vocabulary) -> Encoded:
  """Both splits of a data set, encoded first if the cache does not hold them.

  Args:
    cache: folder that may hold many.
    texts: the data set.
    vocabulary: that the model knows.

  Raises:
    BadData: the cache is not writable, or holds something broken.
  """
  key = hashlib.sha256(f"{texts.digest} {vocabulary.digest}".encode()).hexdigest()
  folder = cache / f"tokens-{key[:16]}"
  try:
    if not folder.exists():
      _write(folder, texts, vocabulary)
  except OSError as error:
    raise BadData(
      f"tokens {folder} cannot be written ({error.strerror}); give another --cache."
    ) from error
  try:
    train, held_out = (_opened(folder / split) for split in SPLITS)
    is_whole = all(
      _digest(t) == (folder / s / "sha256").read_text()
      for t, s in zip((train, held_out), SPLITS, strict=True)
    )
  except (OSError, ValueError, EOFError) as error:
    raise BadData(
      f"tokens {folder} cannot be read ({type(error).__name__}); delete this folder, "
      "and they are encoded anew."
    ) from error
  if not is_whole:
    raise BadData(
      f"tokens {folder} are not those that were written; delete this folder, and they "
      "are encoded anew."
    )
  return Encoded(train, held_out, vocabulary, texts.domains)


_PARTS = ("tokens", "ends", "domain", "unscored")


def _opened(folder: Path) -> Tokens:
  arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS]
  return Tokens(*arrays, folder=folder)


def _digest(some: Tokens) -> str:
  total = hashlib.sha256()
  for part in _PARTS:
    total.update(memoryview(getattr(some, part)))
  return total.hexdigest()


def _write(folder: Path, texts: Texts, vocabulary: Vocabulary) -> None:
  with whole(folder) as unfinished:
    for split in SPLITS:
      some = encoded(getattr(texts, split), vocabulary)
      (unfinished / split).mkdir()
      for part in _PARTS:
        np.save(unfinished / split / f"{part}.npy", getattr(some, part))
      (unfinished / split / "sha256").write_text(_digest(some))
