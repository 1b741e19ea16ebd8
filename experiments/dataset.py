"""The corpus as a tensorflow-datasets data set in array_record files; no TensorFlow.

Written once into a cache folder and read by random access.  A folder appears only when
it is whole, and is read back and compared before it is used.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import hashlib
import io
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from experiments import corpus
from experiments.errors import BadData

SPLITS = ("train", "held_out")


class EmbeddedText(tfds.core.GeneratorBasedBuilder):
  """Documents of `corpus`: their text, domain and id; splits train and held_out."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded, so there are no checksums beside this file; tfds looks for
  # them with a package (importlib_resources) that it does not install.
  code_path = None

  def __init__(self, *, documents: Sequence[corpus.Document] = (), **kwargs):
    self.documents = documents  # to write; reading needs none
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      {
        "id": tfds.features.Text(),
        "domain": tfds.features.ClassLabel(names=list(corpus.DOMAINS)),
        "text": tfds.features.Text(),
      }
    )
    return tfds.core.DatasetInfo(
      builder=self, features=features, metadata=tfds.core.MetadataDict()
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    assert self.info.metadata is not None
    self.info.metadata["digest"] = corpus.digest(self.documents)
    return {
      "train": self._generate_examples(held_out=False),
      "held_out": self._generate_examples(held_out=True),
    }

  def _generate_examples(self, *, held_out: bool):
    for doc in self.documents:
      if doc.held_out == held_out:
        yield doc.id, {"id": doc.id, "domain": doc.domain, "text": doc.text}


class Texts(NamedTuple):
  """Random access to records of `text` (bytes), `domain` (int) and `id` (bytes)."""

  train: Sequence[Any]
  held_out: Sequence[Any]
  digest: str  # of all texts


def load(cache: Path, max_bytes: int) -> Texts:
  """The data set, built first if the cache does not hold it.

  Args:
    cache: folder that may hold many data sets; made if missing.
    max_bytes: UTF-8 bytes of a domain at most.

  Raises:
    BadData: the built or cached data set is not whole, or the cache not writable.
  """
  # Two installations of one Python version may differ, so their place is in the name.
  place = hashlib.sha256(sysconfig.get_path("stdlib").encode()).hexdigest()[:8]
  version = ".".join(map(str, sys.version_info[:3]))
  folder = cache / f"embedded_text-{version}-{place}-{max_bytes}"
  try:
    if not folder.exists():
      _build(folder, max_bytes)
  except OSError as error:
    raise BadData(
      f"data set {folder} cannot be written ({error.strerror}); give another --cache."
    ) from error
  try:
    builder: Any = _builder(folder)
    about = builder.info.metadata
    texts = Texts(*map(builder.as_data_source, SPLITS), digest=about["digest"])
    whole = corpus.digest(_documents(texts)) == texts.digest
  except Exception as error:  # tfds raises many kinds
    raise BadData(
      f"data set {folder} cannot be read ({type(error).__name__}); delete this folder, "
      "and it is built anew."
    ) from error
  if not whole:
    raise BadData(
      f"data set {folder} does not hold what was written; delete this folder, and it "
      "is built anew."
    )
  return texts


def _documents(texts: Texts) -> list[corpus.Document]:
  """All records, in the order of the corpus: their number on disk is not to be trusted.

  (tfds reports the number that it meant to write.)
  """
  records = [*texts.train, *texts.held_out]
  pairs = [(record["id"].decode(), record["text"].decode()) for record in records]
  return sorted(corpus.Document(id, id.partition("/")[0], text) for id, text in pairs)


def _builder(folder: Path, **kwargs: Any) -> EmbeddedText:
  return EmbeddedText(data_dir=str(folder), file_format="array_record", **kwargs)


def _build(folder: Path, max_bytes: int) -> None:
  documents = corpus.documents(max_bytes)
  if len({doc.held_out for doc in documents}) < 2:
    raise BadData(
      f"data.max_bytes={max_bytes} leaves {len(documents)} documents, too few to hold "
      "one out; make it larger."
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
  try:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces each step
      _builder(unfinished, documents=documents).download_and_prepare()
    try:
      os.rename(unfinished, folder)
    except OSError:
      if not folder.exists():  # else another process was first; ours is the same
        raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
