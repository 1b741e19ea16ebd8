"""What every corpus is made of: documents, and what is known about them."""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")


class Document(NamedTuple):
  """A text, the kind of text it is and the source it comes from."""

  domain: str
  source: str  # within the domain; the same source of two domains is on one side
  text: str
  unscored: int = 0  # leading UTF-8 bytes that are a prompt, and carry no loss
  held_out: bool | None = None  # for evaluation; None where `split` is to decide

  @property
  def id(self) -> str:
    """ "domain/source", which no other document of the corpus has."""
    return f"{self.domain}/{self.source}"


class Sized:
  """Documents that are made as they are read, and how many they will be."""

  def __init__(self, count: int, documents: Iterable[Document]):
    self._count, self._documents = count, documents

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[Document]:
    return iter(self._documents)


class Found(NamedTuple):
  """A corpus before anything is left out of it.

  Documents are read once, in order, and only as far as there is room for their domain;
  so `facts` may still grow while they are.
  """

  domains: Mapping[str, Sized | Sequence[Document]]
  facts: dict[str, Any]  # for the manifest: where it comes from, what is not there


def number(source: str) -> int:
  """A hash of a source: an order that depends on nothing else."""
  return int(hashlib.sha256(source.encode()).hexdigest()[:8], 16)


def by_hash(pairs: Iterable[tuple[str, _T]]) -> list[tuple[str, _T]]:
  """Ordered by a hash of the first of each pair."""
  return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def grouped(documents: Iterable[Document]) -> dict[str, list[Document]]:
  """Documents by domain, in the order of the hash of their source."""
  domains: dict[str, list[Document]] = {}
  for document in documents:
    domains.setdefault(document.domain, []).append(document)
  return {
    domain: [doc for _, doc in by_hash((doc.source, doc) for doc in domains[domain])]
    for domain in sorted(domains)
  }


def digest(documents: Sequence[Document]) -> str:
  """Hexadecimal sha256 of all that a run reads of documents."""
  total = hashlib.sha256()
  for doc in documents:
    marks = f"{doc.unscored}\0{int(bool(doc.held_out))}"
    total.update(f"{doc.id}\0{marks}\0{len(doc.text)}\0{doc.text}\0".encode())
  return total.hexdigest()
