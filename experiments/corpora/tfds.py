"""A text data set of tensorflow-datasets that is on disk already; nothing is fetched.

`tfds:FOLDER`, that of a version or one above it, or `tfds:NAME` of a data set below
TFDS_DATA_DIR (`~/tensorflow_datasets` if it is not set).  It must be in array_record
files, which need no TensorFlow.  The text is the feature `text`, or the only one that
is text, or that of `?text=NAME`; `?domain=NAME` names a feature, of text or of labels,
that tells domains apart.  The first split named validation, test or held_out is held
out; splits that are neither this nor train are not read, but counted in the manifest.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.corpora.types import Document, Found, Sized, by_hash
from experiments.errors import BadData
from jmoe.use import nearest

ARGUMENT, OPTIONS = "NAME_OR_FOLDER", ("text", "domain")

_INFO = "dataset_info.json"
_HELD_OUT = ("validation", "test", "held_out")  # the first that there is
_SHOWN = 4  # of several data sets
_UNLABELLED = "unlabelled"  # a label of -1 says that there is none


def state(argument: str) -> str:
  """Which data set on disk, and when it was written."""
  folder = _folder(argument)
  return f"{folder.resolve()} {(folder / _INFO).stat().st_mtime_ns}"


def found(argument: str, *, max_bytes: int, text: str = "", domain: str = "") -> Found:
  """Documents whose sources are a split and the place in it.

  Raises:
    BadData: no such data set on disk, not in array_record files, or no such feature.
  """
  tfds: Any = extras.require(
    "tensorflow_datasets", "data", needed_by=f"corpus tfds:{argument}"
  )
  folder = _folder(argument)
  where = f"data.corpus=tfds:{argument}"
  with _reading(where, folder):
    builder = tfds.builder_from_directory(folder)
    written = builder.info.file_format.value
  if written != "array_record":
    raise BadData(
      f"{where} is in {written} files; prepare it with file_format='array_record'."
    )
  counts = {name: split.num_examples for name, split in builder.info.splits.items()}
  if "train" not in counts:
    raise BadData(
      f"{where} has the splits {', '.join(counts)}, but no train; give another."
    )
  features = builder.info.features
  strings = sorted(n for n, f in features.items() if isinstance(f, tfds.features.Text))
  text = text or _text(strings, list(features), where)
  labels = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  for option, name, known in (
    ("text", text, strings),
    ("domain", domain, strings + labels),
  ):
    if name and name not in known:
      raise BadData(f"{where}: ?{option}={name} is none of its; {nearest(name, known)}")
  names = features[domain].names if domain in labels else None
  read = ["train", *[name for name in _HELD_OUT if name in counts][:1]]
  with _reading(where, folder):
    sources = {name: builder.as_data_source(name) for name in read}

  def domain_of(record: Any) -> str:
    if not domain:
      return builder.name
    if names is None:
      return record[domain].decode()
    return names[record[domain]] if record[domain] >= 0 else _UNLABELLED

  def documents() -> Iterator[Document]:
    places = ((f"{s}/{n}", (s, n)) for s in sources for n in range(len(sources[s])))
    for place, (split, n) in by_hash(places):
      with _reading(where, folder):
        record = sources[split][n]
      try:
        name, string = domain_of(record).replace("/", "-"), record[text].decode()
      except UnicodeDecodeError as error:
        raise BadData(
          f"{where}, record {place}: byte {error.start} is not UTF-8; prepare the data "
          "set anew, from text in UTF-8."
        ) from None
      side = split != "train" if len(read) > 1 else None
      yield Document(name, place, string, held_out=side)

  facts: dict[str, Any] = {"versions": {builder.info.full_name: str(builder.version)}}
  if unread := {name: n for name, n in counts.items() if name not in read}:
    facts["dropped"] = {"splits": unread}
  if not domain:
    count = sum(len(source) for source in sources.values())
    return Found({builder.name: Sized(count, documents())}, facts)
  return Found(_sorted_out(documents(), max_bytes, facts), facts)


@contextlib.contextmanager
def _reading(where: str, folder: Path) -> Iterator[None]:
  try:
    yield
  except ImportError:
    raise
  except Exception as error:  # tfds and array_record raise many kinds
    raise BadData(
      f"{where}: {folder} cannot be read ({type(error).__name__}: "
      f"{' '.join(str(error).split())[:200]}); prepare the data set anew."
    ) from error


def _sorted_out(
  documents: Iterator[Document], max_bytes: int, facts: dict[str, Any]
) -> dict[str, list[Document]]:
  """By domain, in the order that they came; what can not be taken is not kept."""
  domains: dict[str, list[Document]] = {}
  sizes: dict[str, int] = {}
  over: dict[str, int] = {}
  for doc in documents:
    some, used = domains.setdefault(doc.domain, []), sizes.get(doc.domain, 0)
    size = len(doc.text.encode())
    if used + size <= max_bytes:
      sizes[doc.domain] = used + size
      some.append(doc)
    else:
      over[doc.domain] = over.get(doc.domain, 0) + 1
  if over:
    facts["dropped"] = facts.get("dropped", {}) | {"over max_bytes": over}
  return dict(sorted(domains.items()))


def _text(strings: list[str], features: list[str], where: str) -> str:
  if "text" in strings or len(strings) == 1:
    return "text" if "text" in strings else strings[0]
  if not strings:
    raise BadData(
      f"{where} has no feature of text, but {', '.join(features)}; give another."
    )
  raise BadData(
    f"{where} has several texts; choose one: ?text={' or ?text='.join(strings)}."
  )


def _folder(argument: str) -> Path:
  """That of the newest version of a data set."""
  home = Path.home() / "tensorflow_datasets"
  root = Path(os.environ.get("TFDS_DATA_DIR") or home)
  name = argument.replace(":", "/")  # NAME:VERSION
  for start in (Path(argument), root / name):
    infos = [start / _INFO, *start.glob(f"*/{_INFO}"), *start.glob(f"*/*/{_INFO}")]
    folders = [info.parent for info in infos if info.is_file()]
    # One folder, or versions of one configuration, that lie side by side.
    choices = sorted(
      {folder.parent if folder != start else start for folder in folders}
    )
    if len(choices) > 1:
      names = " or ".join(f"tfds:{folder}" for folder in choices[:_SHOWN])
      more = f" or {len(choices) - _SHOWN} others" if len(choices) > _SHOWN else ""
      raise BadData(
        f"data.corpus=tfds:{argument} is several data sets; choose one: {names}{more}."
      )
    if folders:
      return max(folders, key=lambda folder: (_version(folder), folder.as_posix()))
  raise BadData(
    f"data.corpus=tfds:{argument}: no such data set on disk (looked for {argument} and "
    f"{root / name}); nothing is downloaded here, so prepare it first."
  )


def _version(folder: Path) -> tuple[int, ...]:
  return tuple(int(n) for n in folder.name.split(".") if n.isdecimal())
