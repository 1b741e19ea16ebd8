"""The text that every Python carries."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments import corpora
from experiments.corpora import embedded

_MAX_BYTES = 60_000


@pytest.fixture(scope="module")
def documents():
  found, _ = corpora.chosen(corpora.Choice("embedded", _MAX_BYTES))
  return corpora.split(found)


def test_the_corpus_is_the_same_list_each_time(documents, chosen):
  again = chosen("embedded", _MAX_BYTES)
  assert again == documents
  assert corpora.digest(again) == corpora.digest(documents)
  assert len({doc.id for doc in documents}) == len(documents)


def test_every_domain_keeps_to_its_size(documents):
  sizes = dict.fromkeys(("code", "docstrings", "notices", "prose"), 0)
  for doc in documents:
    sizes[doc.domain] += len(doc.text.encode())
  for domain, size in sizes.items():
    assert size <= _MAX_BYTES
    assert domain == "notices" or size > 0.7 * _MAX_BYTES


def test_the_two_texts_of_a_module_are_on_one_side(documents):
  sides = {}
  for doc in documents:
    assert sides.setdefault(doc.source, doc.held_out) == doc.held_out
  assert set(sides.values()) == {True, False}


def test_code_has_lost_its_docstrings():
  docstrings, code = embedded._parsed(dict(embedded.modules())["bisect.py"])
  assert docstrings[0] == "Bisection algorithms."
  assert "Bisection" not in code and "def insort_right" in code
