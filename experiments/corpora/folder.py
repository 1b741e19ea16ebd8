"""Text files of a folder: its first-level folders are domains, each file a document.

Files that lie in the folder itself are the domain `files`.  They are UTF-8, or all in
another encoding: `folder:PATH?encoding=latin-1`; a byte order mark is not text.  Links
are followed.  Names that begin with a dot, links to nothing or back to a folder around
them, and what is neither file nor folder are not read, but counted in the manifest.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.corpora.types import Document, Found, Sized, by_hash
from experiments.errors import BadData

ARGUMENT, OPTIONS = "PATH", ("encoding",)

_TOP = "files"


def state(argument: str) -> str:
  """Names, sizes and times of all files."""
  root = Path(argument)
  files = _files(root, {}) if root.is_dir() else []
  stats = [(path, path.stat()) for path in files]
  listed = [(path.as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
  return f"{root.resolve()} {listed}"


def found(argument: str, *, max_bytes: int, encoding: str = "utf-8") -> Found:
  """Documents whose sources are paths inside their domain; read as they are taken.

  Raises:
    BadData: no such folder, no files, a name that is not UTF-8, two files of one name,
      an unknown encoding; and while reading, a file that is not in this encoding.
  """
  del max_bytes
  root = Path(argument)
  if not root.is_dir():
    what = "that is a file" if root.exists() else "there is no such folder"
    raise BadData(f"data.corpus=folder:{root}: {what}; give a folder of text files.")
  try:
    b"a".decode(encoding, "ignore")
  except (LookupError, ValueError):  # unknown, or of bytes; a name that cannot be one
    raise BadData(
      f"data.corpus=folder:{root}: unknown encoding {encoding!r}; give a name that "
      "Python knows, such as utf-8, latin-1 or cp1252."
    ) from None
  skipped: dict[str, Any] = {}
  domains: dict[str, dict[str, Path]] = {}
  for path in _files(root, skipped):
    first, *rest = path.relative_to(root).parts
    domain, source = (first, "/".join(rest)) if rest else (_TOP, first)
    if _surrogates(path):
      raise BadData(f"{path.as_posix()!a}: its name is not UTF-8; rename it.")
    if (other := domains.setdefault(domain, {}).setdefault(source, path)) != path:
      raise BadData(
        f"{path} and {other} would both be the document {domain}/{source}, as files of "
        f"the folder itself are the domain {_TOP}; rename one of them."
      )
  if not domains:
    raise BadData(
      f"data.corpus=folder:{root}: there are no files in it"
      + (f", but {skipped}, which are not read" if skipped else "")
      + "; give a folder of text files."
    )
  return Found(
    {
      name: Sized(len(paths), _documents(name, paths, encoding))
      for name, paths in domains.items()
    },
    {"dropped": skipped} if skipped else {},
  )


def _files(
  folder: Path, skipped: dict[str, Any], above: tuple[str, ...] = ()
) -> list[Path]:
  """All files, sorted; what is not read is added to `skipped`."""
  above = (*above, os.path.realpath(folder))
  found = []
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      skipped["hidden names"] = skipped.get("hidden names", 0) + 1
    elif path.is_dir() and os.path.realpath(path) not in above:
      found += _files(path, skipped, above)
    elif path.is_file():
      found.append(path)
    else:
      why = "links back" if path.is_dir() else "links to nothing, pipes and devices"
      skipped.setdefault(why, []).append(path.as_posix())
  return found


def _surrogates(path: Path) -> bool:
  """Whether a name has bytes that are not UTF-8, which Python reads as surrogates."""
  try:
    path.as_posix().encode()
  except UnicodeEncodeError:
    return True
  return False


def _documents(
  domain: str, paths: dict[str, Path], encoding: str
) -> Iterator[Document]:
  for source, path in by_hash(paths.items()):
    data = path.read_bytes()
    try:
      text = data.decode(encoding)
    except UnicodeError as error:  # some codecs do not say where
      place = getattr(error, "start", None)
      what = "" if place is None else f"byte {place} (0x{data[place]:02x}) "
      raise BadData(
        f"{path}: {what}is not {encoding}; convert the file, or name its encoding: "
        "folder:PATH?encoding=latin-1 (--encoding latin-1 where a corpus is packed)."
      ) from None
    yield Document(domain, source, text.removeprefix("\ufeff"))
