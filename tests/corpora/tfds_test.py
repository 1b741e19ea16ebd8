"""Data sets of tensorflow-datasets that are on disk already."""
# SPDX-License-Identifier: Apache-2.0

import shutil

import pytest
import tensorflow_datasets as tfds

from experiments import corpora
from experiments.errors import BadData


class Reviews(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.2.0")
  code_path = None

  def _info(self):
    features = {
      "review": tfds.features.Text(),
      "title": tfds.features.Text(),
      "stars": tfds.features.ClassLabel(names=["bad", "good"]),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(50), "test": self._generate_examples(7)}

  def _generate_examples(self, count):
    for n in range(count):
      yield n, {"review": f"Kritik ü {count} {n}", "title": str(n), "stars": n % 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  Reviews(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return folder


def test_all_records_are_read_with_their_labels_as_domains(root, chosen):
  docs = chosen(f"tfds:{root / 'reviews'}?text=review&domain=stars")
  assert {(doc.text, doc.domain, doc.held_out) for doc in docs} == {
    (f"Kritik ü {count} {n}", ["bad", "good"][n % 2], count == 7)
    for count in (50, 7)
    for n in range(count)
  }
  assert len(docs) == 57


def test_a_name_is_looked_for_below_the_data_folder(root, chosen, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  docs = chosen("tfds:reviews:1.2.0?text=title")
  assert {doc.domain for doc in docs} == {"reviews"} and len(docs) == 57
  few = chosen("tfds:reviews?text=review", 200)
  assert set(few) < set(chosen("tfds:reviews?text=review"))
  assert sum(len(doc.text.encode()) for doc in few) <= 200


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("tfds:reviews", "several texts; choose one: ?text=review or ?text=title"),
    ("tfds:reviews?text=stars", "?text=stars is none of its"),
    ("tfds:reviews?text=review&domain=star", "did you mean 'stars'?"),
    ("tfds:wikipedia", "no such data set on disk"),
  ],
)
def test_what_is_not_there_is_named(root, chosen, monkeypatch, name, said):
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  with pytest.raises(BadData) as error:
    chosen(name)
  assert said in str(error.value) and "\n" not in str(error.value)


class Notes(tfds.core.GeneratorBasedBuilder):
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name, version=tfds.core.Version("1.0.0"))
    for name in ("de", "en")
  ]
  code_path = None

  def _info(self):
    features = {
      "kind": tfds.features.ClassLabel(names=["memo", "letter"]),
      "text": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    names = ("train", "validation", "test", "unsupervised")
    return {name: self._generate_examples() for name in names}

  def _generate_examples(self):
    for n in range(30):
      yield n, {"kind": n % 3 - 1, "text": "long " * 40 if n % 2 else f"short {n}"}


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("notes")
  for config in ("de", "en"):
    Notes(
      data_dir=str(folder), config=config, file_format="array_record"
    ).download_and_prepare()
  return folder


def test_several_configurations_are_a_choice(notes, chosen, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(notes))
  with pytest.raises(BadData, match="choose one: tfds:.*notes/de or tfds:.*notes/en"):
    chosen("tfds:notes")
  assert len(chosen("tfds:notes/en")) == len(chosen("tfds:notes/de:1.0.0")) == 60


def test_splits_that_are_not_read_are_counted(notes):
  _, facts = corpora.chosen(corpora.Choice(f"tfds:{notes / 'notes/de'}", 1 << 20))
  assert facts["dropped"] == {"splits": {"test": 30, "unsupervised": 30}}


def test_a_record_without_a_label_is_of_no_labels_domain(notes, chosen):
  docs = chosen(f"tfds:{notes / 'notes/de'}?domain=kind")
  domains = [doc.domain for doc in docs]
  assert {name: domains.count(name) for name in domains} == {
    "letter": 20,
    "memo": 20,
    "unlabelled": 20,
  }


def test_a_document_over_max_bytes_does_not_take_the_others_with_it(notes):
  name = f"tfds:{notes / 'notes/de'}?domain=kind"
  docs, facts = corpora.chosen(corpora.Choice(name, 150))
  assert {doc.domain for doc in docs} == {"letter", "memo", "unlabelled"}
  assert all(doc.text.startswith("short") for doc in docs) and len(docs) == 30
  assert facts["dropped"]["over max_bytes"] == dict.fromkeys(
    ("letter", "memo", "unlabelled"), 10
  )


def test_a_broken_data_set_is_one_line(notes, chosen, tmp_path):
  folder = shutil.copytree(notes / "notes/de/1.0.0", tmp_path / "1.0.0")
  (file,) = folder.glob("*train.array_record*")
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(
    BadData, match="cannot be read .*prepare the data set anew"
  ) as error:
    chosen(f"tfds:{folder}")
  assert "\n" not in str(error.value)
  (folder / "dataset_info.json").write_text("{")
  with pytest.raises(BadData, match="cannot be read .*prepare the data set anew"):
    chosen(f"tfds:{folder}")
