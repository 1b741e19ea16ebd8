"""Text as tokens: bytes, or byte-level BPE; and two tokens more, for document ends."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments import extras
from experiments.errors import BadData
from jmoe.use import nearest

VOCAB_SIZE = 258  # of bytes
_BPE_LEAST = VOCAB_SIZE  # every byte is a token, so nothing is unknown
_FILE = "tokenizer.json"


class Vocabulary(Protocol):
  """What a text becomes, and how many bytes of it each token stands for."""

  size: int  # tokens, the two marks included
  bos: int  # begin of a document
  eos: int  # end of a document
  byte_lengths: np.ndarray  # i32[size]; 0 for the marks
  digest: str  # equal for equal vocabularies

  def encode(self, text: bytes) -> np.ndarray:
    """i32[n+2] tokens of a UTF-8 document, begin and end included."""
    ...

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of tokens up to the end of a document; broken characters become U+FFFD."""
    ...

  def save(self, folder: Path) -> None:
    """Writes what `load` needs, if it needs anything; the folder is made."""
    ...


class Bytes:
  """Every byte is a token."""

  size, bos, eos, digest = VOCAB_SIZE, 256, 257, "bytes"

  def __init__(self):
    self.byte_lengths = (np.arange(self.size) < self.bos).astype(np.int32)

  def encode(self, text: bytes) -> np.ndarray:
    """i32[n+2] tokens of a document of n bytes, begin and end included."""
    inside = np.frombuffer(text, np.uint8).astype(np.int32)
    return np.concatenate([[self.bos], inside, [self.eos]]).astype(np.int32)

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of tokens up to the end of a document; broken characters become U+FFFD."""
    return bytes(t for t in _inside(tokens, self) if t < self.bos).decode(
      errors="replace"
    )

  def save(self, folder: Path) -> None:
    """Nothing to write."""


class BPE:
  """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

  Args:
    tokenizer: of the `tokenizers` package, without tokens for document ends.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    inside = tokenizer.get_vocab_size()
    self.size, self.bos, self.eos = inside + 2, inside, inside + 1
    # Its strings have one character for each byte.
    lengths = [len(tokenizer.id_to_token(n)) for n in range(inside)]
    self.byte_lengths = np.array([*lengths, 0, 0], np.int32)
    self.digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

  def encode(self, text: bytes) -> np.ndarray:
    """i32[n+2] tokens of a UTF-8 document, begin and end included."""
    inside = self._tokenizer.encode(text.decode()).ids
    return np.array([self.bos, *inside, self.eos], np.int32)

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of tokens up to the end of a document; broken characters become U+FFFD."""
    return self._tokenizer.decode([t for t in _inside(tokens, self) if t < self.bos])

  def save(self, folder: Path) -> None:
    """Writes tokenizer.json; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{_FILE}.unfinished-{os.getpid()}"
    unfinished.write_text(self._tokenizer.to_str(), encoding="utf-8")
    unfinished.replace(folder / _FILE)


def size_of(tokenizer: str) -> int:
  """Tokens at most of "bytes" or "bpe:SIZE", the two marks included.

  Raises:
    ValueError: it is neither, or the size is too small.
  """
  kind, _, size = tokenizer.partition(":")
  if tokenizer == "bytes":
    return VOCAB_SIZE
  if kind == "bpe" and size.isdecimal() and int(size) >= _BPE_LEAST:
    return int(size)
  if kind == "bpe":
    raise ValueError(
      f"data.tokenizer={tokenizer!r}; give bpe:SIZE, of at least {_BPE_LEAST} tokens: "
      "the bytes, and a begin and an end of document."
    )
  raise ValueError(
    f"data.tokenizer={tokenizer!r}; {nearest(kind, ('bytes', 'bpe:SIZE'))}"
  )


def trained(tokenizer: str, texts: Iterable[bytes]) -> Vocabulary:
  """The vocabulary of "bytes" or "bpe:SIZE".

  Args:
    tokenizer: which.
    texts: UTF-8 training documents; BPE merges their most frequent pairs, and stops
      below its size where no pair is left that occurs twice.
  """
  size = size_of(tokenizer)
  if tokenizer == "bytes":
    return Bytes()
  package = extras.require("tokenizers", "data", needed_by=f"tokenizer {tokenizer}")
  made = package.Tokenizer(package.models.BPE())
  made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = package.decoders.ByteLevel()
  trainer = package.trainers.BpeTrainer(
    vocab_size=size - 2,
    min_frequency=2,
    initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(_strings(texts), trainer)
  return BPE(made)


def of(tokenizer: str, cache: Path, texts: Any) -> Vocabulary:
  """The vocabulary of a data set, trained first if the cache does not hold it.

  Args:
    tokenizer: "bytes" or "bpe:SIZE".
    cache: folder that may hold many.
    texts: of `experiments.dataset`; its training documents alone are read.
  """
  if tokenizer == "bytes":
    return Bytes()
  package = extras.require("tokenizers", "data", needed_by=f"tokenizer {tokenizer}")
  key = f"{tokenizer} {package.__version__} {texts.digest}"
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = cache / f"{tokenizer.replace(':', '-')}-{name}"
  if not (folder / _FILE).exists():
    made = trained(tokenizer, (record["text"] for record in texts.train))
    try:
      made.save(folder)
    except OSError as error:
      raise BadData(
        f"vocabulary {folder} cannot be written ({error.strerror}); give another "
        "--cache."
      ) from error
  return load(folder, tokenizer)


def load(folder: Path, tokenizer: str) -> Vocabulary:
  """The vocabulary that a run was trained with.

  Args:
    folder: where it was saved.
    tokenizer: of the run; for "bytes" nothing is read.

  Raises:
    BadData: the folder does not hold it.
  """
  if tokenizer == "bytes":
    return Bytes()
  package = extras.require("tokenizers", "data", needed_by=f"tokenizer {tokenizer}")
  path = folder / _FILE
  try:
    text = path.read_text(encoding="utf-8")
    json.loads(text)
    return BPE(package.Tokenizer.from_str(text))
  except Exception as error:  # tokenizers raises bare Exception
    raise BadData(
      f"vocabulary {path} cannot be read ({type(error).__name__}); copy it from where "
      "the run was trained."
    ) from error


def _inside(tokens: Sequence[int], vocabulary: Vocabulary) -> Sequence[int]:
  tokens = list(tokens)
  eos = vocabulary.eos
  return tokens[: tokens.index(eos)] if eos in tokens else tokens


def _strings(texts: Iterable[bytes]) -> Iterator[str]:
  for text in texts:
    yield text.decode()
