"""Near-duplicates: planted ones go, everything else stays."""
# SPDX-License-Identifier: Apache-2.0

import random

import pytest

from experiments import corpora
from experiments.corpora import near_duplicates
from experiments.corpora.types import Document


def text(words: random.Random, count: int = 300) -> list[str]:
  return [f"w{words.randrange(500)}" for _ in range(count)]


@pytest.fixture(scope="module")
def planted():
  """(documents that differ, near copies of half of them)."""
  words = random.Random(0)
  firsts, copies = [], []
  for n in range(60):
    body = text(words)
    firsts.append(Document("ab"[n % 2], f"{n:03}", " ".join(body)))
    if n % 2 == 0:
      body[words.randrange(300)] = "changed"  # five of three hundred runs
      copies.append(Document("b", f"copy-{n:03}", " ".join(body).upper()))
  return firsts, copies


def test_planted_copies_are_removed_and_all_else_is_kept(planted):
  firsts, copies = planted
  docs = sorted([*firsts, *copies], key=lambda doc: doc.id)
  kept, counts = near_duplicates.removed(docs, 0.8)
  assert kept == sorted(firsts, key=lambda doc: doc.id)
  assert counts == {"b": len(copies)}
  assert near_duplicates.removed(docs, 0.8)[0] == kept


def test_what_is_less_similar_than_asked_is_kept(planted):
  firsts, copies = planted
  similar = near_duplicates.jaccard(
    near_duplicates.shingles(firsts[0].text), near_duplicates.shingles(copies[0].text)
  )
  assert 0.95 < similar < 0.98
  docs = [*firsts, *copies]
  kept, counts = near_duplicates.removed(docs, 0.99)
  assert kept == docs and counts == {}


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_pairs_that_are_just_as_similar_as_asked_are_found(similarity):
  words = random.Random(1)
  docs, pairs = [], 0
  for n in range(200):
    body = text(words, 200)
    copy = [*body, *text(words, int(200 * (1 / similarity - 1) * 0.97))]
    some = [near_duplicates.shingles(" ".join(part)) for part in (body, copy)]
    pairs += near_duplicates.jaccard(*some) >= similarity
    docs += [Document("a", f"{n}-{m}", " ".join(p)) for m, p in enumerate((body, copy))]
  kept, counts = near_duplicates.removed(docs, similarity)
  assert pairs == 200 and counts["a"] >= 199 and len(kept) == 400 - counts["a"]


def test_scripts_without_spaces_have_words_too():
  signs = [chr(0x4E00 + n) for n in range(400)]
  text = "".join(signs)
  copy = "".join([*signs[:200], "新", *signs[201:]])
  docs = [Document("zh", "1", text), Document("zh", "2", copy)]
  kept, counts = near_duplicates.removed(docs, 0.8)
  assert kept == docs[:1] and counts == {"zh": 1}


def test_the_count_is_in_the_facts_of_a_choice(tmp_path, planted):
  firsts, copies = planted
  for doc in [*firsts, *copies]:
    path = tmp_path / doc.domain / doc.source
    path.parent.mkdir(exist_ok=True)
    path.write_text(doc.text)
  docs, facts = corpora.chosen(corpora.Choice(f"folder:{tmp_path}", 1 << 30, 0.8))
  assert len(docs) == len(firsts)
  assert facts["dropped"] == {"near duplicates": {"b": len(copies)}}
