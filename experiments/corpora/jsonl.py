"""Documents as lines of JSON, in a file or in all *.jsonl files of a folder.

Files may be packed: `.gz`, `.xz` or `.bz2` behind their name.  A line is {"text": ...},
or {"prompt": ..., "answer": ...}, of which the prompt carries no loss; each may have a
"domain" (else the name of the file) and an "id" (else the number of the line), and
"held_out": true or false (else a hash of the id decides).
"""
# SPDX-License-Identifier: Apache-2.0

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.corpora.types import Document, Found, grouped
from experiments.errors import BadData
from jmoe.use import nearest

ARGUMENT, OPTIONS = "PATH", ()

_OPEN: dict[str, Callable[[Path, str], Any]] = {
  ".bz2": bz2.open,
  ".gz": gzip.open,
  ".xz": lzma.open,
}
_KEYS = ("text", "prompt", "answer", "domain", "id", "held_out")


def state(argument: str) -> str:
  """Names, sizes and times of the files."""
  files = [(path.resolve().as_posix(), path.stat()) for path in _files(Path(argument))]
  return repr([(name, s.st_size, s.st_mtime_ns) for name, s in files])


def found(argument: str, *, max_bytes: int) -> Found:
  """All documents.

  Raises:
    BadData: no such file, one that is cut short, or a line that is not as it should be,
      with its number.
  """
  del max_bytes
  root = Path(argument)
  files = _files(root)
  if not files:
    what = "no *.jsonl file in it" if root.is_dir() else "no such file"
    raise BadData(
      f"data.corpus=jsonl:{root}: there is {what}; give a file of JSON lines, or a "
      "folder of *.jsonl."
    )
  seen: dict[str, str] = {}
  documents = []
  for path in files:
    for place, doc in _documents(path):
      if doc.id in seen:
        raise BadData(
          f"{place}: the id {doc.id!r} is that of {seen[doc.id]} already; give each "
          "document its own."
        )
      seen[doc.id] = place
      documents.append(doc)
  others = sorted(root.iterdir()) if root.is_dir() else []
  unread = [path.name for path in others if path not in files]
  return Found(
    grouped(documents), {"dropped": {"not *.jsonl": unread}} if unread else {}
  )


def _files(root: Path) -> list[Path]:
  if root.is_dir():
    return [
      path
      for path in sorted(root.iterdir())
      if _unpacked(path).endswith(".jsonl")
      and not path.name.startswith(".")
      and path.is_file()
    ]
  return [root] if root.is_file() else []


def _unpacked(path: Path) -> str:
  """The name of a file without that of what packed it."""
  return path.stem if path.suffix in _OPEN else path.name


def _documents(path: Path) -> Iterator[tuple[str, Document]]:
  """(file and line, document)."""
  try:
    with _OPEN.get(path.suffix, open)(path, "rb") as file:
      domain = Path(_unpacked(path)).stem
      for number, line in enumerate(file, 1):
        if number == 1:
          line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
          place = f"{path}, line {number}"
          yield place, _on_a_line(line, place, domain, str(number))
  except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
    raise _cut_short(path, error) from error
  except OSError as error:  # bz2 has no error of its own
    if error.errno is not None:
      raise
    raise _cut_short(path, error) from error


def _cut_short(path: Path, error: Exception) -> BadData:
  return BadData(
    f"{path}: cut short, altered or not {path.suffix} ({error}); copy it again."
  )


def _on_a_line(line: bytes, place: str, domain: str, number: str) -> Document:
  try:
    value = json.loads(line.decode(), object_pairs_hook=_object)
    return _document(value, domain, number)
  except UnicodeDecodeError as error:
    raise BadData(
      f"{place}: its byte {error.start} is not UTF-8; convert the file."
    ) from None
  except json.JSONDecodeError as error:
    raise BadData(
      f"{place}: not JSON ({error.msg}, {error.pos}); write one object a line."
    ) from None
  except RecursionError:
    raise BadData(f"{place}: nested too deeply; write one flat object.") from None
  except ValueError as error:
    raise BadData(f"{place}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    raise ValueError("a key is there twice; write each once.")
  return value


def _document(value: Any, domain: str, number: str) -> Document:
  if not isinstance(value, dict):
    raise ValueError(
      f'a {type(value).__name__}, not an object; write {{"text": "..."}}.'
    )
  if "lines_sha256" in value:
    raise ValueError("the first line of a packed corpus; give packed:FILE.")
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
  for key in ("domain", "id"):
    if type(value.get(key, "")) not in (str, int):
      raise ValueError(
        f'"{key}" is {value[key]!r}; write a text or an integer, or leave it out.'
      )
  domain, source = (
    str(value.get(k, d)) for k, d in (("domain", domain), ("id", number))
  )
  if not domain or "/" in domain:
    raise ValueError(f'"domain" is {domain!r}; give a name without a slash.')
  text = "".join(value[key] for key in wanted)
  try:
    unscored = len(value["prompt"].encode()) if answers else 0
    f"{text}{domain}{source}".encode()
  except UnicodeEncodeError:  # \ud800 and the like are JSON, but no text
    raise ValueError("half of a surrogate pair; write whole characters.") from None
  return Document(domain, source, text, unscored, held_out)
