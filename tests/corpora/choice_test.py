"""Names of corpora, and which documents of one are taken and held out."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments import corpora
from experiments.corpora.types import Document, Found, number
from experiments.errors import BadData


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("handbok", "did you mean 'handbook'?"),
    ("folder", "write folder:PATH."),
    ("embedded:here", "write embedded."),
    ("folder:here?encodng=latin-1", "'encodng'; did you mean 'encoding'?"),
    ("jsonl:here?encoding=latin-1", "unknown option 'encoding'; it has none."),
    ("folder:here?encoding=ascii&encoding=latin-1", "twice; write it once."),
  ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(name, said):
  with pytest.raises(ValueError) as error:
    corpora.parse(name)
  assert f"data.corpus={name!r}" in str(error.value) and said in str(error.value)


def test_options_are_parted_from_a_path_with_colons():
  spec = corpora.parse("folder:a:b/c?encoding=cp1252")
  assert (spec.argument, spec.options) == ("a:b/c", (("encoding", "cp1252"),))


def test_a_path_may_begin_at_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert corpora.parse("folder:~/texts").argument == "/home/me/texts"


def documents(count: int, domain: str = "a") -> list[Document]:
  return [Document(domain, str(n), "text") for n in range(count)]


def test_a_twentieth_is_held_out_whatever_else_there_is():
  docs = corpora.split(documents(2000))
  out = {doc.source for doc in docs if doc.held_out}
  assert 60 < len(out) < 140
  fewer = corpora.split(docs[::2])
  assert {doc.source for doc in fewer if doc.held_out} == out & {
    doc.source for doc in docs[::2]
  }


def test_a_source_is_on_one_side_in_all_domains():
  docs = corpora.split([*documents(400, "a"), *documents(400, "b")])
  sides = {doc.id: doc.held_out for doc in docs}
  assert all(sides[f"a/{n}"] == sides[f"b/{n}"] for n in range(400))


def test_a_small_domain_holds_out_one_and_a_stated_side_stays():
  few = [doc for doc in documents(60, "b") if number(doc.source) % 20][:5]
  stated = [doc._replace(domain="c", held_out=False) for doc in few]
  docs = corpora.split([*few, *stated])
  assert [doc.domain for doc in docs if doc.held_out] == ["b"]


def test_a_domain_stops_at_its_size_and_says_so(tmp_path):
  (tmp_path / "a").mkdir()
  for n in range(20):
    (tmp_path / "a" / f"{n}.txt").write_text("x" * 100)
  (tmp_path / "a" / "empty.txt").write_text(" \n")
  name = f"folder:{tmp_path}"
  whole, _ = corpora.chosen(corpora.Choice(name, 1 << 20))
  docs, facts = corpora.chosen(corpora.Choice(name, 1050))
  assert len(whole) == 20 and len(docs) == 10
  assert set(docs) < set(whole)
  dropped = facts["dropped"]
  empty = dropped.get("empty", {}).get("a", 0)
  assert dropped["not read further"] == {"a": 21 - 10 - empty}  # each is counted
  _, facts = corpora.chosen(corpora.Choice(name, 1 << 20))
  assert facts["dropped"] == {"empty": {"a": 1}}


@pytest.mark.parametrize("name", ["", " ", "a ", "a\nb", "a\x00b"])
def test_a_domain_whose_name_would_not_come_back_is_refused(monkeypatch, name):
  found = Found({name: documents(3, name), "z": documents(3, "z")}, {})
  monkeypatch.setattr(corpora.synthetic, "found", lambda *_, **__: found)
  with pytest.raises(BadData, match="a domain is called .*give it a name") as error:
    corpora.chosen(corpora.Choice("synthetic", 100))
  assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_domain_called_as_the_sum_of_all_is_alone_or_refused(monkeypatch):
  found = {name: documents(3, name) for name in ("all", "z")}
  monkeypatch.setattr(corpora.synthetic, "found", lambda *_, **__: Found(found, {}))
  with pytest.raises(BadData, match="called 'all', as the sum .*give it another name"):
    corpora.chosen(corpora.Choice("synthetic", 100))
  del found["z"]
  assert len(corpora.chosen(corpora.Choice("synthetic", 100))[0]) == 3


def test_half_a_surrogate_pair_is_named_with_its_document(monkeypatch):
  docs = [Document("a", "x", "ab\ud800")]
  monkeypatch.setattr(
    corpora.synthetic, "found", lambda *_, **__: Found({"a": docs}, {})
  )
  with pytest.raises(BadData, match="document a/x: character 2 is half of a surrogate"):
    corpora.chosen(corpora.Choice("synthetic", 100))


def test_a_prompt_without_an_answer_counts_as_empty(monkeypatch):
  docs = [Document("a", "1", "ask", 3), Document("a", "2", "ask it", 3)]
  monkeypatch.setattr(
    corpora.synthetic, "found", lambda *_, **__: Found({"a": docs}, {})
  )
  kept, facts = corpora.chosen(corpora.Choice("synthetic", 100))
  assert kept == docs[1:] and facts["dropped"] == {"empty": {"a": 1}}


def test_embedded_text_counts_all_that_it_leaves():
  some, facts = corpora.chosen(corpora.Choice("embedded", 20_000))
  whole, _ = corpora.chosen(corpora.Choice("embedded", 1 << 40))
  left = sum(sum(counts.values()) for counts in facts["dropped"].values())
  assert len(some) + left >= len(whole) > 2 * len(some)
