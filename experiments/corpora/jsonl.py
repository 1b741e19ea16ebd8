"""Documents as lines of JSON, in a file or in all *.jsonl files of a folder.

A line is {"text": ...}, or {"prompt": ..., "answer": ...}, of which the prompt carries
no loss; each may have a "domain" (else the name of the file) and an "id" (else the
number of the line), and "held_out": true or false (else a hash of the id decides).
"""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.corpora.types import Document, Found, grouped
from experiments.errors import BadData
from jmoe.use import nearest

ARGUMENT, OPTIONS = "PATH", ()

_KEYS = ("text", "prompt", "answer", "domain", "id", "held_out")


def state(argument: str) -> str:
  """Names, sizes and times of the files."""
  files = [(path.resolve().as_posix(), path.stat()) for path in _files(Path(argument))]
  return repr([(name, s.st_size, s.st_mtime_ns) for name, s in files])


def found(argument: str, *, max_bytes: int) -> Found:
  """All documents.

  Raises:
    BadData: no such file, or a line that is not as it should be, with its number.
  """
  del max_bytes
  root = Path(argument)
  files = _files(root)
  if not files:
    what = "no *.jsonl file in it" if root.is_dir() else "no such file"
    raise BadData(f"data.corpus=jsonl:{root}: there is {what}.")
  seen: dict[str, str] = {}
  documents = []
  for path in files:
    for place, doc in _documents(path):
      if doc.id in seen:
        raise BadData(f"{place}: the id {doc.id!r} is that of {seen[doc.id]} already.")
      seen[doc.id] = place
      documents.append(doc)
  return Found(grouped(documents), {})


def _files(root: Path) -> list[Path]:
  if root.is_dir():
    return sorted(root.glob("*.jsonl"))
  return [root] if root.is_file() else []


def _documents(path: Path) -> Iterator[tuple[str, Document]]:
  """(file and line, document)."""
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      place = f"{path}, line {number}"
      try:
        yield place, _document(json.loads(line.decode()), path.stem, str(number))
      except UnicodeDecodeError as error:
        raise BadData(f"{place}: its byte {error.start} is not UTF-8.") from None
      except json.JSONDecodeError as error:
        raise BadData(f"{place}: not JSON ({error.msg}, {error.pos}).") from None
      except ValueError as error:
        raise BadData(f"{place}: {error}") from None


def _document(value: Any, domain: str, number: str) -> Document:
  if not isinstance(value, dict):
    raise ValueError(f"a {type(value).__name__}, not an object.")
  for key in value:
    if key not in _KEYS:
      raise ValueError(f"unknown key {key!r}; {nearest(key, _KEYS)}")
  answers = "prompt" in value or "answer" in value
  wanted = ("prompt", "answer") if answers else ("text",)
  for key in wanted:
    if not isinstance(value.get(key), str):
      has = (
        f"{key!r} is a {type(value[key]).__name__}" if key in value else f"no {key!r}"
      )
      raise ValueError(f'{has}; write {{"text": "..."}}, or "prompt" and "answer".')
  if answers and "text" in value:
    raise ValueError('both "text" and a "prompt" or "answer"; write one of them.')
  held_out = value.get("held_out")
  if not isinstance(held_out, bool | None):
    raise ValueError(f'"held_out" is {held_out!r}; write true or false.')
  domain, source = (
    str(value.get(k, d)) for k, d in (("domain", domain), ("id", number))
  )
  if not domain or "/" in domain:
    raise ValueError(f'"domain" is {domain!r}; give a name without a slash.')
  text = "".join(value[key] for key in wanted)
  try:
    unscored = len(value["prompt"].encode()) if answers else 0
    text.encode()
  except UnicodeEncodeError:  # \ud800 and the like are JSON, but no text
    raise ValueError("half of a surrogate pair; write whole characters.") from None
  return Document(domain, source, text, unscored, held_out)
