"""A corpus as a tensorflow-datasets data set in array_record files; no TensorFlow.

Written once into a cache folder and read by random access.  A folder appears only when
it is whole, and is read back and compared before it is used.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments import corpora
from experiments.config import Data
from experiments.corpora import Document
from experiments.corpora.manifest import manifest
from experiments.errors import BadData
from experiments.extras import MissingExtra
from experiments.whole import whole

SPLITS = ("train", "held_out")


class TextDomains(tfds.core.GeneratorBasedBuilder):
  """Documents of a corpus: their text, domain and id; splits train and held_out."""

  VERSION = tfds.core.Version("2.2.0")
  # Nothing is downloaded, so there are no checksums beside this file; tfds looks for
  # them with a package (importlib_resources) that it does not install.
  code_path = None

  def __init__(
    self, *, documents: Sequence[Document], about: dict[str, Any], **kwargs: Any
  ):
    self.documents, self.about = documents, about
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    domains = sorted({doc.domain for doc in self.documents})
    features = tfds.features.FeaturesDict(
      {
        "id": tfds.features.Text(),
        "domain": tfds.features.ClassLabel(names=domains),
        "text": tfds.features.Text(),
        "unscored": tfds.features.Scalar(dtype=np.int32),
      }
    )
    return tfds.core.DatasetInfo(
      builder=self, features=features, metadata=tfds.core.MetadataDict(self.about)
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {
      "train": self._generate_examples(held_out=False),
      "held_out": self._generate_examples(held_out=True),
    }

  def _generate_examples(self, *, held_out: bool):
    for doc in self.documents:
      if doc.held_out == held_out:
        some = {"id": doc.id, "domain": doc.domain, "text": doc.text}
        yield doc.id, some | {"unscored": doc.unscored}


class Texts(NamedTuple):
  """Random access to records of `id`, `text` (bytes), `domain` and `unscored` (int)."""

  train: Sequence[Any]
  held_out: Sequence[Any]
  domains: tuple[str, ...]  # names of the numbers in `domain`
  digest: str  # of all texts
  manifest: dict[str, Any]  # where they come from, counts, what was left out


def load(cache: Path, config: Data) -> Texts:
  """The data set, built first if the cache does not hold it.

  Args:
    cache: folder that may hold many data sets; made if missing.
    config: its corpus, max_bytes and near_duplicates are read.

  Raises:
    BadData: the corpus cannot be read, the built or cached data set is not whole, or
      the cache not writable.
    MissingExtra: a package is not installed.
  """
  try:
    return _loaded(cache, config)
  except MissingExtra:
    raise
  except ImportError as error:  # tfds imports some of what it needs when it needs it
    raise MissingExtra(
      f"data sets need {error.name or error}; run: pip install 'jmoe[data]'"
    ) from error


def _loaded(cache: Path, config: Data) -> Texts:
  choice = corpora.Choice(config.corpus, config.max_bytes, config.near_duplicates)
  key = f"{TextDomains.VERSION} {choice.state()}"
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = cache / f"{corpora.parse(config.corpus).kind}-{name}"
  try:
    if not folder.exists():
      _build(folder, choice)
  except OSError as error:
    raise BadData(
      f"data set {folder} cannot be written ({error.strerror}); give another --cache."
    ) from error
  try:
    builder: Any = tfds.builder_from_directory(_inner(folder))
    about = builder.info.metadata["manifest"]
    domains = tuple(builder.info.features["domain"].names)
    train, held_out = map(builder.as_data_source, SPLITS)
    texts = Texts(train, held_out, domains, about["digest"], about)
    is_whole = corpora.digest(_documents(texts)) == texts.digest
  except ImportError:
    raise
  except Exception as error:  # tfds raises many kinds
    raise BadData(
      f"data set {folder} cannot be read ({type(error).__name__}); delete this folder, "
      "and it is built anew."
    ) from error
  if not is_whole:
    raise BadData(
      f"data set {folder} does not hold what was written; delete this folder, and it "
      "is built anew."
    )
  return texts


def _documents(texts: Texts) -> list[Document]:
  """All records, in the order of the corpus: their number on disk is not to be trusted.

  (tfds reports the number that it meant to write.)
  """
  found = []
  for split in SPLITS:
    for record in getattr(texts, split):
      domain, _, source = record["id"].decode().partition("/")
      text, unscored = record["text"].decode(), int(record["unscored"])
      held_out = split == "held_out"
      found.append(Document(domain, source, text, unscored, held_out))
  return sorted(found, key=lambda doc: doc.id)


def _inner(folder: Path) -> Path:
  """Where tfds puts a data set in the folder that it is given."""
  return folder / "text_domains" / str(TextDomains.VERSION)


def _build(folder: Path, choice: corpora.Choice) -> None:
  try:
    found, facts = corpora.chosen(choice)
  except OSError as error:
    raise BadData(f"corpus {choice.corpus} cannot be read ({error}).") from error
  documents = corpora.split(found)
  sides = {doc.held_out for doc in documents}
  if len(sides) < 2 and all(doc.held_out is not None for doc in found) and documents:
    side = "held out" if True in sides else "to be trained on"
    raise BadData(
      f"all {len(documents)} documents of corpus {choice.corpus} say that they are "
      f"{side}; state the other side for some, or leave it out."
    )
  if len(sides) < 2:
    raise BadData(
      f"data.max_bytes={choice.max_bytes} leaves {len(documents)} documents of corpus "
      f"{choice.corpus}, too few to hold one out; make it larger, or add documents."
    )
  about = {"manifest": manifest(documents, facts, choice)}
  with whole(folder) as unfinished:
    tfds.disable_progress_bar()
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # tfds announces each step
        TextDomains(
          documents=documents,
          about=about,
          data_dir=str(unfinished),
          file_format="array_record",
        ).download_and_prepare()
    except (ImportError, OSError):
      raise
    except Exception as error:  # array_record's, where a disk is full
      raise BadData(
        f"data set {folder} cannot be written ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}); make room, or give another --cache."
      ) from error
