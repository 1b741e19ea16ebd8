"""Corpora of a user's own files: folders of text, and lines of JSON."""
# SPDX-License-Identifier: Apache-2.0

import bz2
import gzip
import json
import lzma
import os

import pytest
import tensorflow_datasets as tfds

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


def test_links_are_followed_and_what_is_not_read_is_counted(tmp_path):
  root = tmp_path / "texts"
  write(tmp_path / "elsewhere" / "a.txt", "one")
  write(root / "b" / "b.txt", "two")
  write(root / "b" / ".hidden", "not this")
  write(root / ".git" / "config", "nor this")
  (root / "a").symlink_to("../elsewhere")
  (root / "b" / "same.txt").symlink_to("b.txt")
  (root / "b" / "round").symlink_to("..")
  (root / "gone").symlink_to("nowhere")
  os.mkfifo(root / "b" / "pipe")
  docs, facts = corpora.chosen(corpora.Choice(f"folder:{root}", 1000))
  assert [doc.id for doc in docs] == ["a/a.txt", "b/b.txt", "b/same.txt"]
  assert facts["dropped"] == {
    "hidden names": 2,
    "links back": [f"{root}/b/round"],
    "links to nothing, pipes and devices": [f"{root}/b/pipe", f"{root}/gone"],
  }


def test_a_byte_order_mark_is_not_text(tmp_path, chosen):
  write(tmp_path / "f" / "a" / "x.txt", "\ufeffGrüße")
  assert [doc.text for doc in chosen(f"folder:{tmp_path / 'f'}")] == ["Grüße"]
  write(tmp_path / "x.jsonl", '\ufeff{"text": "one"}\r\n{"text": "two"}')
  assert [doc.text for doc in chosen(f"jsonl:{tmp_path / 'x.jsonl'}")] == ["one", "two"]


def test_two_files_that_would_be_one_document_are_named(tmp_path, chosen):
  write(tmp_path / "files" / "x.txt", "one")
  write(tmp_path / "x.txt", "two")
  with pytest.raises(BadData, match="x.txt and .*x.txt would both .*rename one"):
    chosen(f"folder:{tmp_path}")


def test_a_name_that_is_not_utf_8_is_refused(tmp_path, chosen):
  (tmp_path / "a").mkdir()
  with open(os.fsencode(tmp_path / "a") + b"/caf\xe9", "wb") as file:
    file.write(b"text")
  with pytest.raises(BadData, match=r"a/caf\\udce9': its name is not UTF-8; rename it"):
    chosen(f"folder:{tmp_path}")


@pytest.mark.parametrize("encoding", ["base64", "rot13", "undefined", "", "a%00b"])
def test_what_is_no_encoding_of_text_is_refused(tmp_path, chosen, encoding):
  write(tmp_path / "a" / "x", "text")
  with pytest.raises(BadData, match="unknown encoding .*give a name that Python knows"):
    chosen(f"folder:{tmp_path}?encoding={encoding}")


def test_an_encoding_that_does_not_say_where_it_fails_is_still_one_line(
  tmp_path, chosen
):
  write(tmp_path / "a" / "x", "a-!!")
  with pytest.raises(BadData, match="a/x: is not punycode; convert the file"):
    chosen(f"folder:{tmp_path}?encoding=punycode")


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


@pytest.mark.parametrize("module", [bz2, gzip, lzma])
def test_lines_may_be_packed_and_a_cut_file_is_named(tmp_path, chosen, module):
  path = tmp_path / f"x.jsonl.{ {bz2: 'bz2', gzip: 'gz', lzma: 'xz'}[module] }"
  whole = module.compress("\n".join(f'{{"text": "{n}"}}' for n in range(999)).encode())
  write(path, whole)
  assert {doc.domain for doc in chosen(f"jsonl:{path}")} == {"x"}
  assert len(chosen(f"jsonl:{tmp_path}")) == 999
  for broken in (whole[:-9], b"no packed text"):
    write(path, broken)
    with pytest.raises(
      BadData, match=f"{path}: cut short, altered or not .{path.suffix[1:]}"
    ):
      chosen(f"jsonl:{path}")


def test_what_a_folder_of_lines_holds_beside_them_is_named(tmp_path):
  write(tmp_path / "a.jsonl", '{"text": "one"}')
  write(tmp_path / "b" / "c.jsonl", '{"text": "not this"}')
  write(tmp_path / ".d.jsonl", '{"text": "nor this"}')
  docs, facts = corpora.chosen(corpora.Choice(f"jsonl:{tmp_path}", 1000))
  assert [doc.id for doc in docs] == ["a/1"]
  assert facts["dropped"] == {"not *.jsonl": [".d.jsonl", "b"]}


@pytest.mark.parametrize(("side", "said"), [(True, "held out"), (False, "trained on")])
def test_lines_that_are_all_on_one_side_are_refused(tmp_path, side, said):
  lines = (json.dumps({"text": str(n), "held_out": side}) for n in range(9))
  write(tmp_path / "x.jsonl", "\n".join(lines))
  name = f"jsonl:{tmp_path / 'x.jsonl'}"
  config = Data(max_bytes=1000, seq=8, batch=1, eval_context=0, corpus=name)
  with pytest.raises(BadData, match=f"all 9 documents .*{said}; state the other side"):
    dataset.load(tmp_path / "cache", config)


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
    (b'{"text": "a", "domain": null}', '"domain" is None; write a text'),
    (b'{"text": "a", "id": {"x": 1}}', "leave it out"),
    (b'{"text": "a", "id": true}', "leave it out"),
    (b'{"text": "a", "domain": "\\ud800"}', "half of a surrogate pair"),
    (b'{"text": "a", "text": "b"}', "a key is there twice"),
    (b'{"lines_sha256": "a"}', "give packed:FILE"),
    (b"[" * 100_000, "nested too deeply"),
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
  assert made["packages"]["tensorflow-datasets"] == tfds.__version__
  assert {"array_record", "datasketch", "grain", "tokenizers"} < set(made["packages"])
