"""Data sets of tensorflow-datasets that are on disk already."""
# SPDX-License-Identifier: Apache-2.0

import pytest
import tensorflow_datasets as tfds

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
