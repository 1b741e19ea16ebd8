"""Text that every Python installation carries, as documents with a domain label.

Four domains: `prose` (the language reference behind `help()`), `docstrings` (of the
standard library, by module), `code` (the same modules without their docstrings) and
`notices` (licence and news texts; Debian ships a Python without them, so it is
optional).  The text differs a little between Python versions: a run records its digest.
"""
# SPDX-License-Identifier: Apache-2.0

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.corpora.types import Document, Found, Sized, by_hash

ARGUMENT, OPTIONS = "", ()

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3")


def state(argument: str) -> str:
  """Version and place of this Python: two of one version may differ."""
  del argument
  return f"{sys.version} {sysconfig.get_path('stdlib')}"


def found(argument: str, *, max_bytes: int) -> Found:
  """Documents whose sources are topics, paths of modules and parts of files."""
  del argument, max_bytes
  parsed = functools.cache(_parsed)  # two domains read the same modules
  files, notices = by_hash(modules()), by_hash(_notices())
  topics = by_hash(_topics().items())
  texts = {
    "prose": (topics, _once((name, text.split("\n\n")) for name, text in topics)),
    "docstrings": (files, _once((name, parsed(path)[0]) for name, path in files)),
    "code": (files, ((name, parsed(path)[1]) for name, path in files)),
    "notices": (notices, notices),
  }
  version = ".".join(map(str, sys.version_info[:3]))
  return Found(
    {
      domain: Sized(len(some), _documents(domain, pairs))
      for domain, (some, pairs) in texts.items()
    },
    {"versions": {"python": version}},
  )


def _documents(domain: str, pairs: Iterable[tuple[str, str]]) -> Iterator[Document]:
  for source, text in pairs:
    yield Document(domain, source, text)


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


def _topics() -> dict[str, str]:
  from pydoc_data.topics import topics

  return topics


def modules() -> Iterator[tuple[str, Path]]:
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
