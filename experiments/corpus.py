"""Text that every Python installation carries, as documents with a domain label.

Four domains: `prose` (the language reference behind `help()`), `docstrings` (of the
standard library, by module), `code` (the same modules without their docstrings) and
`notices` (licence and news texts; Debian ships a Python without them, so it is
optional).  The text differs a little between Python versions: a run records its digest.

First stage of the data path: corpus -> `dataset` -> `data` -> step.
"""
# SPDX-License-Identifier: Apache-2.0

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")

DOMAINS = ("prose", "docstrings", "code", "notices")
_HELD_OUT = 20  # one document of so many
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3")


class Document(NamedTuple):
  """A text, the source it comes from and the kind of text it is."""

  id: str  # "domain/source"
  domain: str
  text: str

  @property
  def held_out(self) -> bool:
    """Whether it is for evaluation: by a hash of its source, never by a draw.

    The source alone is hashed, so that a module's code and its docstrings are on the
    same side.
    """
    source = self.id.partition("/")[2]
    return int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) % _HELD_OUT == 0


def documents(max_bytes: int) -> list[Document]:
  """The corpus, the same list on every call of one Python installation.

  Args:
    max_bytes: UTF-8 bytes of a domain at most; whole documents, in the order of a hash,
      until nearly as many.

  Returns:
    Documents sorted by id, none empty.
  """
  parsed = functools.cache(_parsed)  # two domains read the same modules
  modules = _by_hash(_modules())
  found = {
    "prose": _prose(),
    "docstrings": _once((name, parsed(path)[0]) for name, path in modules),
    "code": ((name, parsed(path)[1]) for name, path in modules),
    "notices": _by_hash(_notices()),
  }
  return sorted(
    doc for domain in DOMAINS for doc in _some(domain, found[domain], max_bytes)
  )


def digest(docs: Sequence[Document]) -> str:
  """Hexadecimal sha256 of all ids and texts."""
  total = hashlib.sha256()
  for doc in docs:
    total.update(f"{doc.id}\0{doc.text}\0".encode())
  return total.hexdigest()


def _some(
  domain: str, texts: Iterable[tuple[str, str]], max_bytes: int
) -> Iterator[Document]:
  """Those of a domain that fit; no more are read once nine tenths are full."""
  used = 0
  for source, text in texts:
    size = len(text.encode())
    if text.strip() and used + size <= max_bytes:
      used += size
      yield Document(f"{domain}/{source}", domain, text)
    if used > 0.9 * max_bytes:
      return


def _by_hash(pairs: Iterable[tuple[str, _T]]) -> list[tuple[str, _T]]:
  """Ordered by a hash of the first of each pair."""
  return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _once(texts: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, str]]:
  """Joins parts, each only where it is first seen.

  Topics of the reference repeat one another's sections, and inherited docstrings
  repeat; kept, they would carry held-out text into training.
  """
  seen: set[str] = set()
  for source, parts in texts:
    new = [p for p in dict.fromkeys(parts) if p.strip() and p not in seen]
    seen.update(new)
    yield source, "\n\n".join(new)


def _prose() -> Iterator[tuple[str, str]]:
  from pydoc_data.topics import topics

  yield from _once(
    (name, text.split("\n\n")) for name, text in _by_hash(topics.items())
  )


def _modules() -> Iterator[tuple[str, Path]]:
  """(path inside the standard library, path) of its modules."""
  root = Path(sysconfig.get_path("stdlib"))
  for path in root.rglob("*.py"):
    inside = path.relative_to(root)
    if any(part in _SKIPPED or part.startswith("config-") for part in inside.parts):
      continue
    if inside.name.startswith("_sysconfigdata") or inside.parts[0] == "pydoc_data":
      continue  # holds paths of one machine; is the prose
    yield inside.as_posix(), path


def _parsed(path: Path) -> tuple[list[str], str]:
  """(docstrings, code without them) of a module; nothing if it cannot be read."""
  try:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
  except (SyntaxError, UnicodeDecodeError, OSError):
    return [], ""
  nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
  found = [(node.body[0], ast.get_docstring(node)) for node in nodes if node.body]
  strings = [(place, string) for place, string in found if string is not None]
  strings.sort(key=lambda pair: pair[0].lineno)
  return [s for _, s in strings], _without(text, [place for place, _ in strings])


def _without(text: str, strings: list[ast.stmt]) -> str:
  """Source code without the lines of its docstrings."""
  lines = text.splitlines()
  gone = {n for s in strings for n in range(s.lineno, (s.end_lineno or s.lineno) + 1)}
  return "\n".join(line for n, line in enumerate(lines, 1) if n not in gone)


def _notices() -> Iterator[tuple[str, str]]:
  root = Path(sysconfig.get_path("stdlib"))
  for path in (root / "LICENSE.txt", *sorted(root.glob("idlelib/*.txt"))):
    if not path.is_file():
      continue
    text = path.read_text(encoding="utf-8", errors="replace")
    # News by release: small documents, so that a part of them can be held out.
    for n, part in enumerate(text.split("\n\n\n")):
      yield f"{path.name}/{n}", part
