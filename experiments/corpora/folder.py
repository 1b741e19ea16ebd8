"""Text files of a folder: its first-level folders are domains, each file a document.

Files that lie in the folder itself are the domain `files`.  They are UTF-8, or all in
another encoding: `folder:PATH?encoding=latin-1`.  Names that begin with a dot are not
read.
"""
# SPDX-License-Identifier: Apache-2.0

import codecs
from collections.abc import Iterator
from pathlib import Path

from experiments.corpora.types import Document, Found, by_hash
from experiments.errors import BadData

ARGUMENT, OPTIONS = "PATH", ("encoding",)

_TOP = "files"


def state(argument: str) -> str:
  """Names, sizes and times of all files."""
  root = Path(argument)
  files = [(path, path.stat()) for path in _files(root)]
  listed = [(path.as_posix(), s.st_size, s.st_mtime_ns) for path, s in files]
  return f"{root.resolve()} {listed}"


def found(argument: str, *, max_bytes: int, encoding: str = "utf-8") -> Found:
  """Documents whose sources are paths inside their domain; read as they are taken.

  Raises:
    BadData: no such folder, no files, an unknown encoding; and while reading, a file
      that is not in this encoding.
  """
  del max_bytes
  root = Path(argument)
  if not root.is_dir():
    raise BadData(f"data.corpus=folder:{root}: there is no such folder.")
  try:
    codecs.lookup(encoding)
  except LookupError:
    raise BadData(
      f"data.corpus=folder:{root}: unknown encoding {encoding!r}; give a name that "
      "Python knows, such as utf-8, latin-1 or cp1252."
    ) from None
  domains: dict[str, list[tuple[str, Path]]] = {}
  for path in _files(root):
    first, *rest = path.relative_to(root).parts
    domain, source = (first, "/".join(rest)) if rest else (_TOP, first)
    domains.setdefault(domain, []).append((source, path))
  if not domains:
    raise BadData(f"data.corpus=folder:{root}: there are no files in it.")
  return Found(
    {name: _documents(name, pairs, encoding) for name, pairs in domains.items()}, {}
  )


def _files(root: Path) -> list[Path]:
  return [
    path
    for path in sorted(root.rglob("*"))
    if path.is_file()
    and not any(part.startswith(".") for part in path.relative_to(root).parts)
  ]


def _documents(
  domain: str, pairs: list[tuple[str, Path]], encoding: str
) -> Iterator[Document]:
  for source, path in by_hash(pairs):
    data = path.read_bytes()
    try:
      text = data.decode(encoding)
    except UnicodeDecodeError as error:
      raise BadData(
        f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not {encoding}; "
        "convert the file, or name its encoding: folder:PATH?encoding=latin-1 "
        "(--encoding latin-1 where a corpus is packed)."
      ) from None
    yield Document(domain, source, text)
