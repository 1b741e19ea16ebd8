"""Manuals and code in thirteen domains and eight languages, from Debian packages.

About 100 MB: LibreOffice's help in eight languages (the same pages, so a page is on one
side in all of them), the documentation of Python and of the Linux kernel, manual pages,
WordNet's definitions as a dictionary, and the source of Python's standard library.
Packages are downloaded and unpacked in a temporary folder.  Versions move with a
release's updates, so the manifest names them; what a release lacks is left out, and
named there and on stderr.  `handbook?essays=yes` adds political essays ("anarchism").
"""
# SPDX-License-Identifier: Apache-2.0

import gzip
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from experiments.corpora import debian, embedded, markup
from experiments.corpora.debian import Unpacked
from experiments.corpora.types import Document, Found, grouped
from experiments.errors import BadData

ARGUMENT, OPTIONS = "", ("essays",)

LANGUAGES = {
  name.partition("-")[0]: name for name in "en-us de es fr ru ja ko zh-cn".split()
}
_HELP = "libreoffice-help-"
_OTHERS = {
  "python-docs": (r"python([0-9]+)\.([0-9]+)-doc",),
  "kernel-docs": (r"linux-doc-([0-9]+)\.([0-9]+)", "linux-doc"),  # the first that is
  "man-pages": ("manpages", "manpages-dev"),
  "dictionary": ("wordnet-base",),
}
_ESSAYS = "anarchism"
_SHORTEST = 200  # UTF-8 bytes
_GLOSSES = 32  # of a page of the dictionary
_UNTRANSLATED = 0.3  # of the lines of a page


def state(argument: str) -> str:
  """Nothing: what a cache holds stays, however packages move on."""
  del argument
  return ""


def found(argument: str, *, max_bytes: int, essays: str = "no") -> Found:
  """Documents of all domains, read at once.

  Raises:
    BadData: no apt here, it knows none of the packages, or the download failed.
  """
  del argument, max_bytes
  if essays not in ("yes", "no"):
    raise BadData(f"data.corpus=handbook?essays={essays}; write yes or no.")
  patterns = [_HELP + name for name in LANGUAGES.values()]
  patterns += [pattern for some in _OTHERS.values() for pattern in some]
  patterns += [_ESSAYS] if essays == "yes" else []
  names, missing = debian.resolve(patterns)
  if _OTHERS["kernel-docs"][0] in names:  # the other one only points to it
    names.pop(_OTHERS["kernel-docs"][1], None)
    missing = [name for name in missing if name != _OTHERS["kernel-docs"][1]]
  for name in missing:
    debian.warn(f"this release has no package {name}; the handbook lacks it.")
  with tempfile.TemporaryDirectory(prefix="handbook-") as folder:
    packages = debian.fetch(sorted(names.values()), Path(folder))
    dropped: dict[str, Counter[str]] = {}
    kept = list(_worth_keeping(_documents(names, packages, dropped), dropped))
  versions = {name: package.version for name, package in sorted(packages.items())}
  versions["python"] = ".".join(map(str, sys.version_info[:3]))
  facts = {
    "versions": versions,
    "dropped": {"packages": missing, **{why: dict(n) for why, n in dropped.items()}},
  }
  return Found(grouped(kept), facts)


def _documents(
  names: dict[str, str], packages: dict[str, Unpacked], dropped: dict[str, Counter[str]]
) -> Iterator[Document]:
  english: dict[str, set[str]] = {}
  untranslated = dropped.setdefault("untranslated pages", Counter())
  for language, package in LANGUAGES.items():
    if _HELP + package not in names:
      continue
    for source, text in _help(packages[_HELP + package].root):
      lines = [line for line in text.splitlines() if len(line) > 20]
      same = sum(line in english.get(source, ()) for line in lines)
      if language == "en":
        english[source] = set(lines)
      if same > _UNTRANSLATED * len(lines):
        untranslated[language] += 1
      else:
        yield Document(language, source, text)
  readers = {
    "python-docs": _python_docs,
    "kernel-docs": _kernel_docs,
    "man-pages": _manuals,
    "dictionary": _dictionary,
  }
  for domain, patterns in _OTHERS.items():
    for pattern in patterns:
      if pattern in names:
        for source, text in readers[domain](packages[names[pattern]].root):
          yield Document(domain, source, text)
  for source, path in embedded.modules():
    yield Document("python-code", source, path.read_text("utf-8", errors="replace"))
  if _ESSAYS in names:
    for source, text in _essays(packages[_ESSAYS].root):
      yield Document("essays", source, text)


def _worth_keeping(
  documents: Iterator[Document], dropped: dict[str, Counter[str]]
) -> Iterator[Document]:
  """Those that are neither short nor the same as an earlier one."""
  short = dropped.setdefault(f"under {_SHORTEST} bytes", Counter())
  again = dropped.setdefault("exact duplicates", Counter())
  seen: set[str] = set()
  for doc in documents:
    if len(doc.text.encode()) < _SHORTEST:
      short[doc.domain] += 1
    elif doc.text in seen:
      again[doc.domain] += 1
    else:
      seen.add(doc.text)
      yield doc


def _help(root: Path) -> Iterator[tuple[str, str]]:
  text = _folder(root, "usr/share/libreoffice/help/*/text")
  for path in sorted(text.rglob("*.html")):
    page = path.read_text("utf-8")
    yield path.relative_to(text).as_posix(), markup.help_page(page)


def _python_docs(root: Path) -> Iterator[tuple[str, str]]:
  folder = _folder(root, "usr/share/doc/python*/html/_sources")
  for path in sorted(folder.rglob("*.rst.txt")):
    yield path.relative_to(folder).as_posix(), path.read_text("utf-8")


def _kernel_docs(root: Path) -> Iterator[tuple[str, str]]:
  folder = _folder(root, "usr/share/doc/linux-doc*/Documentation")
  for path in sorted([*folder.rglob("*.rst.gz"), *folder.rglob("*.rst")]):
    inside = path.relative_to(folder)
    if inside.parts[0] != "translations" and path.is_file():
      yield inside.as_posix().removesuffix(".gz"), _read(path)


def _manuals(root: Path) -> Iterator[tuple[str, str]]:
  folder = root / "usr/share/man"
  for path in sorted(folder.glob("man*/*.gz")):
    if not path.is_symlink():
      source = path.relative_to(folder).as_posix().removesuffix(".gz")
      yield source, markup.manual_page(_read(path))


def _dictionary(root: Path) -> Iterator[tuple[str, str]]:
  files: dict[str, list[str]] = {}
  for part in ("noun", "verb", "adj", "adv"):
    text = (root / "usr/share/wordnet" / f"data.{part}").read_text("utf-8")
    for line in text.splitlines():
      if not line.startswith(" "):  # the licence
        number, gloss = markup.gloss(line)
        files.setdefault(number, []).append(gloss)
  for number, glosses in files.items():
    for n in range(0, len(glosses), _GLOSSES):
      yield f"{number}/{n // _GLOSSES}", "\n".join(glosses[n : n + _GLOSSES])


def _essays(root: Path) -> Iterator[tuple[str, str]]:
  for path in sorted(root.rglob("*.html")):
    if path.name.startswith(("sec", "app")):
      yield path.name, markup.web_page(path.read_text("utf-8", errors="replace"))


def _folder(root: Path, pattern: str) -> Path:
  """Where a package has its texts; packages link folders to each other."""
  folders = sorted({path.resolve() for path in root.glob(pattern)})
  if not folders:
    raise BadData(
      f"package {root.name} has no {pattern}: its layout is not known; report this."
    )
  return folders[0]


def _read(path: Path) -> str:
  data = path.read_bytes()
  data = gzip.decompress(data) if path.suffix == ".gz" else data
  return data.decode("utf-8", errors="replace")
