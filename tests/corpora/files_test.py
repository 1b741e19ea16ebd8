"""Corpora of a user's own files: folders of text, and lines of JSON."""
# SPDX-License-Identifier: Apache-2.0

import json
import os

import pytest

from experiments import corpora, dataset
from experiments.config import Data
from experiments.errors import BadData


def write(path, content: str | bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_first_level_folders_are_domains_and_files_documents(tmp_path, chosen):
  write(tmp_path / "de" / "a.txt", "Grüße")
  write(tmp_path / "de" / "deep" / "b.txt", "tief")
  write(tmp_path / "en" / "a.txt", "greetings\r\n")
  write(tmp_path / "top.txt", "top")
  write(tmp_path / "de" / ".hidden", "not this")
  write(tmp_path / ".git" / "config", "nor this")
  found = {doc.id: doc.text for doc in chosen(f"folder:{tmp_path}")}
  assert found == {
    "de/a.txt": "Grüße",
    "de/deep/b.txt": "tief",
    "en/a.txt": "greetings\r\n",
    "files/top.txt": "top",
  }


def test_an_undecodable_byte_is_named_with_its_file_and_place(tmp_path, chosen):
  path = tmp_path / "de" / "alt.txt"
  write(path, "abc Gr\u00fc\u00dfe".encode("latin-1"))
  write(tmp_path / "de" / "neu.txt", "abc")
  with pytest.raises(BadData) as error:
    chosen(f"folder:{tmp_path}")
  assert str(error.value).startswith(f"{path}: byte 6 (0xfc) is not utf-8")
  assert "?encoding=latin-1" in str(error.value)
  found = {
    doc.source: doc.text for doc in chosen(f"folder:{tmp_path}?encoding=latin-1")
  }
  assert found["alt.txt"] == "abc Grüße"


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("folder:{}/none", "there is no such folder"),
    ("folder:{}", "there are no files in it"),
    ("folder:{}?encoding=utf-9", "unknown encoding 'utf-9'"),
    ("jsonl:{}/none.jsonl", "there is no such file"),
    ("jsonl:{}", "there is no *.jsonl file in it"),
  ],
)
def test_files_that_are_not_there_are_named(tmp_path, chosen, name, said):
  with pytest.raises(
    BadData, match=".*".join(("data.corpus=", str(tmp_path)))
  ) as error:
    chosen(name.format(tmp_path))
  assert said in str(error.value)


def test_a_changed_folder_is_another_data_set(tmp_path):
  config = Data(
    max_bytes=1000, seq=8, batch=1, eval_context=0, corpus=f"folder:{tmp_path / 'f'}"
  )
  for n in range(3):
    write(tmp_path / "f" / "a" / str(n), f"text {n}")
  first = dataset.load(tmp_path / "cache", config)
  assert len(first.train) == 2 and len(first.held_out) == 1
  assert dataset.load(tmp_path / "cache", config).manifest == first.manifest
  write(tmp_path / "f" / "a" / "0", "TEXT 0")
  os.utime(tmp_path / "f" / "a" / "0", ns=(1, 1))
  assert dataset.load(tmp_path / "cache", config).digest != first.digest


def test_lines_are_texts_or_prompts_with_answers(tmp_path, chosen):
  lines = [
    {"text": "Grüße"},
    {"text": "b", "domain": "news", "id": 7},
    {"prompt": "Was heißt grün?\n", "answer": "green", "held_out": True},
  ]
  write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
  docs = {doc.id: doc for doc in chosen(f"jsonl:{tmp_path / 'x.jsonl'}")}
  assert {id: doc.text for id, doc in docs.items()} == {
    "x/1": "Grüße",
    "news/7": "b",
    "x/3": "Was heißt grün?\ngreen",
  }
  assert docs["x/3"].unscored == len("Was heißt grün?\n".encode())
  assert docs["x/1"].unscored == 0
  assert docs["x/3"].held_out and not docs["x/1"].held_out


def test_a_folder_of_lines_has_a_domain_for_each_file(tmp_path, chosen):
  write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
  write(tmp_path / "b.jsonl", '{"text": "three"}')
  write(tmp_path / "c.txt", "not this")
  assert [doc.id for doc in chosen(f"jsonl:{tmp_path}")] == ["a/1", "a/2", "b/1"]


@pytest.mark.parametrize(
  ("line", "said"),
  [
    (b'{"text": "a"', "not JSON"),
    (b"[1]", "a list, not an object"),
    (b'{"txt": "a"}', "unknown key 'txt'; did you mean 'text'?"),
    (b'{"domain": "a"}', "no 'text'"),
    (b'{"text": 3}', "'text' is a int"),
    (b'{"prompt": "a"}', "no 'answer'"),
    (b'{"prompt": "a", "answer": "b", "text": "c"}', "write one of them"),
    (b'{"text": "a", "domain": "x/y"}', "without a slash"),
    (b'{"text": "a", "held_out": 1}', "write true or false"),
    (b'{"text": "\xff"}', "its byte 10 is not UTF-8"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    (b'{"text": "a", "id": 1}', "the id 'x/1' is that of"),
  ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, chosen, line, said):
  path = tmp_path / "x.jsonl"
  write(path, b'{"text": "good"}\n\n' + line + b"\n")
  with pytest.raises(BadData) as error:
    chosen(f"jsonl:{path}")
  message = str(error.value)
  assert message.startswith(f"{path}, line 3: ") and said in message
  assert "\n" not in message


def test_a_manifest_counts_what_is_there(tmp_path):
  write(tmp_path / "x.jsonl", '{"text": "é", "domain": "a"}\n' * 1 + '{"text": "bc"}\n')
  docs, facts = corpora.chosen(corpora.Choice(f"jsonl:{tmp_path}", 100))
  from experiments.corpora.manifest import manifest

  docs = [doc._replace(held_out=doc.domain == "a") for doc in docs]
  made = manifest(docs, facts, corpora.Choice("jsonl:x", 100))
  assert made["domains"] == {
    "a": {
      "train": {"documents": 0, "bytes": 0},
      "held_out": {"documents": 1, "bytes": 2},
    },
    "x": {
      "train": {"documents": 1, "bytes": 2},
      "held_out": {"documents": 0, "bytes": 0},
    },
  }
  assert made["digest"] == corpora.digest(docs)
