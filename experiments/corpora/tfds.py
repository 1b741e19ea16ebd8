"""A text data set of tensorflow-datasets that is on disk already; nothing is fetched.

`tfds:FOLDER`, that of a version or one above it, or `tfds:NAME` of a data set below
TFDS_DATA_DIR (`~/tensorflow_datasets` if it is not set).  It must be in array_record
files, which need no TensorFlow.  The text is the feature `text`, or the only one that
is text, or that of `?text=NAME`; `?domain=NAME` names a feature, of text or of labels,
that tells domains apart.  A split named validation, test or held_out is held out.
"""
# SPDX-License-Identifier: Apache-2.0

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import extras
from experiments.corpora.types import Document, Found, by_hash
from experiments.errors import BadData
from jmoe.use import nearest

ARGUMENT, OPTIONS = "NAME_OR_FOLDER", ("text", "domain")

_INFO = "dataset_info.json"
_HELD_OUT = ("validation", "test", "held_out")  # the first that there is


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
  builder = tfds.builder_from_directory(folder)
  where = f"data.corpus=tfds:{argument}"
  written = builder.info.file_format.value
  if written != "array_record":
    raise BadData(
      f"{where} is in {written} files; prepare it with file_format='array_record'."
    )
  splits = list(builder.info.splits)
  if "train" not in splits:
    raise BadData(f"{where} has the splits {', '.join(splits)}, but no train.")
  features = builder.info.features
  strings = sorted(n for n, f in features.items() if isinstance(f, tfds.features.Text))
  text = text or _text(strings, where)
  labels = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  for option, name, known in (
    ("text", text, strings),
    ("domain", domain, strings + labels),
  ):
    if name and name not in known:
      raise BadData(f"{where}: ?{option}={name} is none of its; {nearest(name, known)}")
  names = features[domain].names if domain in labels else None
  held_out = [name for name in _HELD_OUT if name in splits][:1]
  sources = {name: builder.as_data_source(name) for name in ["train", *held_out]}

  def domain_of(record: Any) -> str:
    if not domain:
      return builder.name
    return names[record[domain]] if names else record[domain].decode()

  def documents() -> Iterator[Document]:
    places = ((f"{s}/{n}", (s, n)) for s in sources for n in range(len(sources[s])))
    for place, (split, n) in by_hash(places):
      record = sources[split][n]
      try:
        name, string = domain_of(record).replace("/", "-"), record[text].decode()
      except UnicodeDecodeError as error:
        raise BadData(
          f"{where}, record {place}: byte {error.start} is not UTF-8."
        ) from None
      side = split != "train" if held_out else None
      yield Document(name, place, string, held_out=side)

  facts = {"versions": {builder.info.full_name: str(builder.version)}}
  if not domain:
    return Found({builder.name: documents()}, facts)
  return Found(_sorted_out(documents(), max_bytes), facts)


def _sorted_out(
  documents: Iterator[Document], max_bytes: int
) -> dict[str, list[Document]]:
  """By domain, in the order that they came; what can not be taken is not kept."""
  domains: dict[str, list[Document]] = {}
  sizes: dict[str, int] = {}
  for doc in documents:
    if sizes.get(doc.domain, 0) <= max_bytes:
      sizes[doc.domain] = sizes.get(doc.domain, 0) + len(doc.text.encode())
      domains.setdefault(doc.domain, []).append(doc)
  return dict(sorted(domains.items()))


def _text(strings: list[str], where: str) -> str:
  if "text" in strings or len(strings) == 1:
    return "text" if "text" in strings else strings[0]
  if not strings:
    raise BadData(f"{where} has no feature of text.")
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
    if folders:
      return max(folders, key=lambda folder: (_version(folder), folder.as_posix()))
  raise BadData(
    f"data.corpus=tfds:{argument}: no such data set on disk (looked for {argument} and "
    f"{root / name}); nothing is downloaded here."
  )


def _version(folder: Path) -> tuple[int, ...]:
  return tuple(int(n) for n in folder.name.split(".") if n.isdecimal())
