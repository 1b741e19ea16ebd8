"""Corpora by name: text as documents with a domain, from many places.

First stage of the data path: corpus -> `dataset` -> `tokens` -> `data` -> step.

A corpus is named by `KIND` or `KIND:ARGUMENT`, with options behind a question mark
(`folder:texts?encoding=latin-1`).  Each kind is a module here, with

- `ARGUMENT`: what stands after the colon, for messages; "" if nothing does;
- `OPTIONS`: names of its options;
- `found(argument, *, max_bytes, **options) -> Found`;
- `state(argument) -> str`: text that differs when what is found would.

`python -m experiments.corpora KIND:ARGUMENT --out FILE` packs any of them into a file.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from experiments.corpora import (
  embedded,
  folder,
  handbook,
  jsonl,
  near_duplicates,
  packed,
  synthetic,
  tfds,
)
from experiments.corpora.types import Document, Found, Sized, digest, number
from experiments.errors import BadData
from jmoe.use import nearest

__all__ = ["KINDS", "Choice", "Document", "Spec", "chosen", "digest", "parse", "split"]

KINDS: dict[str, ModuleType] = {
  "embedded": embedded,
  "folder": folder,
  "handbook": handbook,
  "jsonl": jsonl,
  "packed": packed,
  "synthetic": synthetic,
  "tfds": tfds,
}
_SUM = "all"  # what evaluations call it
_HELD_OUT = 20  # one source of so many is held out


@dataclasses.dataclass(frozen=True)
class Spec:
  """A corpus as it was named."""

  kind: str
  argument: str
  options: tuple[tuple[str, str], ...]

  @property
  def module(self) -> ModuleType:
    """That of its kind."""
    return KINDS[self.kind]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A corpus, and which of its documents."""

  corpus: str
  max_bytes: int  # of a domain
  near_duplicates: float = 0.0  # similarity from which on a document is left out

  def state(self) -> str:
    """Text that differs when the documents would."""
    spec = parse(self.corpus)
    return repr((dataclasses.astuple(self), spec.module.state(spec.argument)))


def parse(text: str) -> Spec:
  """The parts of `KIND[:ARGUMENT][?OPTION=VALUE&...]`; nothing is looked for.

  Raises:
    ValueError: an unknown kind or option, or an argument that is missing or too many.
  """
  name, _, query = text.partition("?")
  kind, _, argument = name.partition(":")
  if kind not in KINDS:
    raise ValueError(f"data.corpus={text!r}; {nearest(kind, KINDS)}")
  module = KINDS[kind]
  if bool(argument) != bool(module.ARGUMENT):
    wanted = f"{kind}:{module.ARGUMENT}" if module.ARGUMENT else kind
    raise ValueError(f"data.corpus={text!r}; write {wanted}.")
  options = urllib.parse.parse_qsl(query, keep_blank_values=True)
  for option, _ in options:
    if option not in module.OPTIONS:
      known = nearest(option, module.OPTIONS) if module.OPTIONS else "it has none."
      raise ValueError(f"data.corpus={text!r}: unknown option {option!r}; {known}")
  if len(dict(options)) < len(options):
    raise ValueError(f"data.corpus={text!r}: an option is there twice; write it once.")
  # A shell leaves a ~ behind a colon as it is.
  return Spec(kind, os.path.expanduser(argument), tuple(options))


def chosen(choice: Choice) -> tuple[list[Document], dict[str, Any]]:
  """Documents sorted by id, none empty; and facts about them for a manifest.

  They are the same on every call, as long as what is read is the same: whole documents
  of a domain, in the order of a hash, until there is nearly `max_bytes` of it.

  Raises:
    BadData: what is named is not there, or cannot be read; or a domain or a text
      cannot be written as lines of UTF-8.
  """
  spec = parse(choice.corpus)
  found: Found = spec.module.found(
    spec.argument, max_bytes=choice.max_bytes, **dict(spec.options)
  )
  dropped: dict[str, dict[str, int]] = {}
  docs = []
  for domain, some in found.domains.items():
    if not domain.strip() == domain != "" or not domain.isprintable():
      raise BadData(
        f"data.corpus={choice.corpus}: a domain is called {domain!r}; give it a name "
        "that can be printed, without spaces around it."
      )
    if domain == _SUM and len(found.domains) > 1:
      raise BadData(
        f"data.corpus={choice.corpus}: a domain is called {domain!r}, as the sum of "
        "all domains is; give it another name."
      )
    docs += _that_fit(some, choice.max_bytes, domain, dropped)
  docs.sort(key=lambda doc: doc.id)
  if choice.near_duplicates:
    docs, counts = near_duplicates.removed(docs, choice.near_duplicates)
    dropped["near duplicates"] = counts
  facts = dict(found.facts)
  known = facts.get("dropped", {})
  facts["dropped"] = known | {
    why: _added(known.get(why, {}), counts) for why, counts in dropped.items()
  }
  return docs, facts


def split(docs: list[Document]) -> list[Document]:
  """The same documents, each on a side.

  Where a document does not say, a hash of its source decides, never a draw.  A domain
  of which this would hold out nothing gives its first source in the order of the hash.
  """
  by_domain: dict[str, list[Document]] = {}
  for doc in docs:
    by_domain.setdefault(doc.domain, []).append(doc)
  out = {doc.source for doc in docs if number(doc.source) % _HELD_OUT == 0}
  for some in by_domain.values():
    free = [doc.source for doc in some if doc.held_out is None]
    if len(free) > 1 and not any(_is_out(doc, out) for doc in some):
      out.add(min(free, key=number))
  return [doc._replace(held_out=_is_out(doc, out)) for doc in docs]


def _is_out(doc: Document, out: set[str]) -> bool:
  return doc.source in out if doc.held_out is None else doc.held_out


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
  return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}


def _that_fit(
  docs: Sized | Sequence[Document],
  max_bytes: int,
  domain: str,
  dropped: dict[str, dict[str, int]],
) -> Iterator[Document]:
  """Those of a domain that fit; no more are read once nine tenths are full."""

  def drop(why: str, count: int = 1) -> None:
    counts = dropped.setdefault(why, {})
    counts[domain] = counts.get(domain, 0) + count

  used = 0
  for place, doc in enumerate(docs, 1):
    try:
      text = doc.text.encode()
    except UnicodeEncodeError as error:
      raise BadData(
        f"document {doc.id}: character {error.start} is half of a surrogate pair; "
        "write whole characters."
      ) from None
    if not text[doc.unscored :].strip():
      drop("empty")
    elif used + len(text) > max_bytes:
      drop("over max_bytes")
    else:
      used += len(text)
      yield doc
    if used > 0.9 * max_bytes:
      if place < len(docs):
        drop("not read further", len(docs) - place)
      return
