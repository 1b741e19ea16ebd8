"""What the tests of corpora share; without the extras there are none."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util

import pytest

_NEEDED = (
  *("optax", "grain", "tensorflow_datasets", "array_record"),
  *("datasketch", "tokenizers"),
)
if not all(map(importlib.util.find_spec, _NEEDED)):
  collect_ignore_glob = ["*_test.py"]


@pytest.fixture
def chosen():
  """Documents of a corpus by its name, each on a side."""
  from experiments import corpora

  def documents(name, max_bytes=1 << 40, near_duplicates=0.0):
    found, _ = corpora.chosen(corpora.Choice(name, max_bytes, near_duplicates))
    return corpora.split(found)

  return documents
