"""A corpus in one file: the same after a round trip, refused when it is not whole."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import gzip
import json
import lzma

import pytest

from experiments import corpora
from experiments.corpora import __main__ as build, packed
from experiments.corpora.types import number
from experiments.errors import BadData

LINES = [
  {"text": "Grüße, 日本\r\n", "domain": "a", "id": "x/1"},
  {"text": "another", "domain": "a", "id": "x/2"},
  {"text": "another", "domain": "b", "id": "x/2"},
  {"prompt": "was? ", "answer": "das", "domain": "b", "id": "3", "held_out": True},
]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "lines.jsonl"
  by_hash = [str(n) for n in range(200) if number(str(n)) % 20 == 0]
  stated = [{"text": id, "id": id, "held_out": False} for id in by_hash]
  path.write_text("\n".join(map(json.dumps, [*LINES, *stated])))
  return f"jsonl:{path}"


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_round_trip_keeps_documents_sides_and_digest(
  tmp_path, source, chosen, capsys, suffix
):
  out = tmp_path / f"packed.jsonl.{suffix}"
  assert build.main([source, "--out", str(out)]) == 0
  docs = chosen(f"packed:{out}")
  assert docs == chosen(source) and len(docs) > 8
  shown = capsys.readouterr().out
  assert corpora.digest(docs)[:16] in shown
  opener = lzma.open if suffix == "xz" else gzip.open
  with opener(out, "rt", encoding="utf-8") as file:
    manifest, *lines = map(json.loads, file)
  assert manifest["corpus"] == source and manifest["digest"] == corpora.digest(docs)
  assert manifest["domains"]["b"]["held_out"]["documents"] >= 1
  assert lines[0] == {"domain": "a", "id": "x/1", "text": "Grüße, 日本\r\n"}
  assert len(lines) == len(docs) == manifest["documents"]


def test_two_builds_are_the_same_bytes(tmp_path):
  outs = [tmp_path / f"{n}.jsonl.gz" for n in range(2)]
  for out in outs:
    assert build.main(["synthetic", "--max-bytes", "4000", "--out", str(out)]) == 0
  assert outs[0].read_bytes() == outs[1].read_bytes()


def test_some_domains_may_be_packed_alone(tmp_path, source, chosen, capsys):
  out = tmp_path / "b.jsonl.gz"
  assert build.main([source, "--domains", "c", "--out", str(out)]) == 2
  assert "--domains c: no such domain; known: a, b, lines." in capsys.readouterr().err
  assert build.main([source, "--domains", "b", "--out", str(out)]) == 0
  assert chosen(f"packed:{out}") == [doc for doc in chosen(source) if doc.domain == "b"]


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_every_flipped_byte_and_every_cut_is_refused(tmp_path, source, chosen, suffix):
  out = tmp_path / f"packed.jsonl.{suffix}"
  build.main([source, "--out", str(out)])
  good = out.read_bytes()
  docs = chosen(f"packed:{out}")
  refused = 0
  for place in range(len(good)):
    for bad in (
      good[:place],
      good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :],
    ):
      out.write_bytes(bad)
      try:
        # A byte of gzip's head that says nothing about the content may change.
        assert chosen(f"packed:{out}") == docs
      except BadData as error:
        refused += 1
        assert f"packed:{out}" in str(error) and "\n" not in str(error)
  assert refused > 2 * len(good) - 16


def test_an_altered_line_is_refused_by_its_digest(tmp_path, source, chosen):
  out = tmp_path / "packed.jsonl.gz"
  build.main([source, "--out", str(out)])
  text = gzip.decompress(out.read_bytes()).decode()
  out.write_bytes(gzip.compress(text.replace("another", "amother", 1).encode()))
  with pytest.raises(BadData, match="cut short or altered .its digest"):
    chosen(f"packed:{out}")


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["folder:{}/none", "--out", "{}/x.jsonl.xz"], "there is no such folder"),
    (["synthetic", "--out", "{}/x.jsonl"], "end it in .xz or .gz"),
    (["synthetic", "--out", "{}/none/x.gz"], "there is no folder"),
    (["synthtic", "--out", "{}/x.gz"], "did you mean 'synthetic'?"),
    (["packed:{}/none", "--out", "{}/x.gz"], "there is no such file"),
    (["packed:{}/old.txt", "--out", "{}/x.gz"], "cut short or altered"),
    (["jsonl:{}/empty.jsonl", "--out", "{}/x.gz"], "no documents; nothing was written"),
    (["packed:{}", "--out", "{}/x.gz"], "cannot be read (Is a directory); give a file"),
    (
      ["synthetic", "--max-bytes", "9", "--out", "{}/x.gz"],
      "left out: {{'over max_byt",
    ),
    (["folder:{}", "--encoding", "", "--out", "{}/x.gz"], "unknown encoding ''"),
    (["folder:{}", "--encoding", "a&b", "--out", "{}/x.gz"], "unknown encoding 'a&b'"),
  ],
)
def test_a_build_that_cannot_be_is_one_line_and_no_file(
  tmp_path, capsys, arguments, said
):
  (tmp_path / "old.txt").write_text("plain")
  (tmp_path / "empty.jsonl").write_text("\n")
  files = sorted(tmp_path.rglob("*"))
  assert build.main([part.format(tmp_path) for part in arguments]) == 2
  shown = capsys.readouterr()
  assert said.format() in shown.err and shown.err.count("\n") == 1 and shown.out == ""
  assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--max-bytes", "0"], "--max-bytes: '0'; give a number of bytes over 0"),
    (["--max-bytes", "1e6"], "--max-bytes: '1e6'; give a number"),
    (["--near-duplicates", "2"], "'2' is a similarity; give one of 0 to 1"),
    (["--near-duplicates", "nan"], "'nan' is a similarity"),
    (["--encodin"], "expected one argument"),
  ],
)
def test_a_bad_argument_of_a_build_is_one_line(tmp_path, capsys, arguments, said):
  with pytest.raises(SystemExit) as stopped:
    build.main(["synthetic", "--out", str(tmp_path / "x.gz"), *arguments])
  shown = capsys.readouterr().err
  assert stopped.value.code == 2 and said in shown and shown.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named_and_so_is_an_end_by_ctrl_c(
  tmp_path, capsys, monkeypatch
):
  def fail(error):
    def write(*_):
      raise error

    monkeypatch.setattr(build.packed, "write", write)
    code = build.main(["synthetic", "--max-bytes", "999", "--out", f"{tmp_path}/x.gz"])
    return code, capsys.readouterr().err

  code, shown = fail(OSError(28, "No space left on device"))
  assert code == 2 and shown.count("\n") == 1
  assert f"--out {tmp_path}/x.gz: cannot be written (No space left" in shown
  code, shown = fail(KeyboardInterrupt())
  assert code == 130 and "stopped; " in shown and "was not written" in shown


def test_two_builds_at_once_do_not_write_into_each_other(
  tmp_path, source, chosen, monkeypatch
):
  out, docs, writer = tmp_path / "x.jsonl.gz", chosen(source), packed._writer
  pids = [2, 1]

  @contextlib.contextmanager
  def while_another_writes(path, suffix):
    with writer(path, suffix) as file:
      if pids:
        packed.write(out, docs[:3], {})
      yield file

  monkeypatch.setattr(packed, "_writer", while_another_writes)
  monkeypatch.setattr(packed.os, "getpid", lambda: pids.pop() if pids else 0)
  packed.write(out, docs, {})
  assert chosen(f"packed:{out}") == docs
  assert {path.name for path in tmp_path.iterdir()} == {out.name, "lines.jsonl"}


def test_an_encoding_reaches_the_folder(tmp_path, chosen):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x").write_bytes("Grüße".encode("latin-1"))
  out = tmp_path / "a.jsonl.gz"
  command = [f"folder:{tmp_path / 'a'}", "--encoding", "latin-1", "--out", str(out)]
  assert build.main(command) == 0
  assert [doc.text for doc in chosen(f"packed:{out}")] == ["Grüße"]
