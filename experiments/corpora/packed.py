"""A built corpus in one file, to be carried where it cannot be built.

xz or gzip by the suffix.  The first line is the manifest, with a sha256 of all others;
each other line is a document, as in a `jsonl` corpus: {"domain", "id", "text"} and
perhaps "unscored" or "held_out".
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from experiments.corpora.types import Document, Found, grouped
from experiments.errors import BadData

ARGUMENT, OPTIONS = "FILE", ()
SUFFIXES = (".xz", ".gz")


def state(argument: str) -> str:
  """Where the file is and when it was changed."""
  path = Path(argument)
  try:
    about = path.stat()
  except OSError:
    return ""
  return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"


def found(argument: str, *, max_bytes: int) -> Found:
  """All documents of the file, whose digest is compared.

  Raises:
    BadData: there is no such file, or it is not as it was written.
  """
  del max_bytes
  path = Path(argument)
  try:
    with _reader(path) as file:
      manifest, documents = _read(file)
  except FileNotFoundError as error:
    raise BadData(
      f"data.corpus=packed:{path}: there is no such file; build it with `python -m "
      "experiments.corpora`, or copy it here."
    ) from error
  except OSError as error:
    if error.errno is None:  # gzip's, where a byte differs
      raise _broken(path, str(error)) from error
    raise BadData(
      f"data.corpus=packed:{path}: cannot be read ({error.strerror}); give a file made "
      "by `python -m experiments.corpora`."
    ) from error
  except (EOFError, lzma.LZMAError, zlib.error) as error:
    raise _broken(path, str(error)) from error
  except (ValueError, KeyError, TypeError) as error:
    raise _broken(path, "not the lines of a packed corpus") from error
  if manifest is None:
    raise _broken(path, "its digest is not that of its first line")
  about = {k: v for k, v in manifest.items() if k not in ("lines_sha256", "documents")}
  return Found(grouped(documents), {"packed": about})


def write(path: Path, documents: Sequence[Document], manifest: dict[str, Any]) -> None:
  """Writes a whole file, or none.

  Args:
    path: ends in .xz or .gz.
    documents: before they are split, as they are again where they are read.
    manifest: the first line.
  """
  lines = [_line(doc) for doc in documents]
  total = hashlib.sha256()
  for line in lines:
    total.update(line)
  head = manifest | {"documents": len(lines), "lines_sha256": total.hexdigest()}
  unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
  try:
    with _writer(unfinished, path.suffix) as file:
      file.write(json.dumps(head, ensure_ascii=False).encode() + b"\n")
      for line in lines:
        file.write(line)
    os.replace(unfinished, path)
  finally:
    unfinished.unlink(missing_ok=True)


def _line(doc: Document) -> bytes:
  value: dict[str, Any] = {"domain": doc.domain, "id": doc.source, "text": doc.text}
  if doc.unscored:
    value["unscored"] = doc.unscored
  if doc.held_out is not None:
    value["held_out"] = doc.held_out
  return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _read(file: IO[bytes]) -> tuple[dict[str, Any] | None, list[Document]]:
  """(manifest or None if the digest differs, documents)."""
  manifest = json.loads(file.readline())
  total = hashlib.sha256()
  documents = []
  for line in file:
    total.update(line)
    value = json.loads(line)
    some = (value["domain"], value["id"], value["text"], value.get("unscored", 0))
    documents.append(Document(*some, held_out=value.get("held_out")))
  whole = total.hexdigest() == manifest["lines_sha256"]
  return manifest if whole else None, documents


def _broken(path: Path, why: str) -> BadData:
  return BadData(
    f"data.corpus=packed:{path}: cut short or altered ({why}); copy it again, or build "
    "it anew."
  )


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[IO[bytes]]:
  with path.open("rb") as raw:
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
      kind = gzip.GzipFile(fileobj=raw)
    elif start == b"\xfd7zXZ\x00":
      kind = lzma.LZMAFile(raw)
    else:
      raise ValueError("neither xz nor gzip")
    with kind as file:
      yield io.BufferedReader(file)  # type: ignore[arg-type]


@contextlib.contextmanager
def _writer(path: Path, suffix: str) -> Iterator[IO[bytes]]:
  if suffix == ".xz":
    with lzma.open(path, "wb", preset=2, check=lzma.CHECK_SHA256) as file:
      yield file
  else:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
      yield file  # type: ignore[misc]
