"""Bytes and byte-level BPE as tokens, and the files that hold them."""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from experiments import dataset, tokens, vocabulary
from experiments.config import Data
from experiments.errors import BadData
from experiments.settings import with_settings

TEXT = "Grüße, 日本語 🙂\r\n\tdef f(x):  return  x\x00".encode()


@pytest.fixture(scope="module")
def bpe(texts, cache):
  return vocabulary.of("bpe:400", cache, texts)


def test_bpe_has_its_size_and_its_marks_are_last(bpe):
  assert (bpe.size, bpe.bos, bpe.eos) == (400, 398, 399)
  assert bpe.byte_lengths.shape == (400,) and bpe.byte_lengths.max() > 3
  assert bpe.byte_lengths[[bpe.bos, bpe.eos]].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["bytes", "bpe:400"])
def test_byte_lengths_of_a_documents_tokens_sum_to_its_bytes(kind, texts, cache):
  words = vocabulary.of(kind, cache, texts)
  held_out = [record["text"] for record in texts.held_out]
  for text in [*held_out, TEXT, b""]:
    found = words.encode(text)
    assert found[0] == words.bos and found[-1] == words.eos
    assert words.byte_lengths[found].sum() == len(text)
    assert words.decode(found[1:].tolist()) == text.decode()


def test_bpe_is_shorter_than_bytes_and_trained_on_training_documents(bpe, texts):
  train = [record["text"] for record in texts.train]
  text = b"".join(train)
  assert len(bpe.encode(text)) < 0.7 * len(text)
  again = vocabulary.trained("bpe:400", train)
  assert again.digest == bpe.digest
  others = vocabulary.trained("bpe:400", [record["text"] for record in texts.held_out])
  assert others.digest != bpe.digest


def test_a_saved_vocabulary_is_the_same(bpe, tmp_path):
  bpe.save(tmp_path / "vocabulary")
  again = vocabulary.load(tmp_path / "vocabulary", "bpe:400")
  assert again.digest == bpe.digest
  np.testing.assert_array_equal(again.encode(TEXT), bpe.encode(TEXT))
  np.testing.assert_array_equal(again.byte_lengths, bpe.byte_lengths)
  vocabulary.Bytes().save(tmp_path / "bytes")
  assert not (tmp_path / "bytes").exists()
  assert vocabulary.load(tmp_path / "bytes", "bytes").size == 258


def test_a_vocabulary_that_is_lost_or_broken_is_refused(bpe, tmp_path):
  with pytest.raises(BadData, match="tokenizer.json cannot be read .FileNotFound"):
    vocabulary.load(tmp_path, "bpe:400")
  bpe.save(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"model": 1}')
  with pytest.raises(BadData, match="tokenizer.json cannot be read"):
    vocabulary.load(tmp_path, "bpe:400")


@pytest.mark.parametrize(
  ("tokenizer", "said"),
  [
    ("byte", "did you mean 'bytes'?"),
    ("bpe", "give bpe:SIZE, of at least 258"),
    ("bpe:200", "give bpe:SIZE, of at least 258"),
    ("bpe:many", "give bpe:SIZE"),
  ],
)
def test_a_tokenizer_that_is_none_is_refused(tokenizer, said):
  with pytest.raises(ValueError) as error:
    Data(max_bytes=1, seq=2, batch=1, eval_context=0, tokenizer=tokenizer)
  assert f"data.tokenizer={tokenizer!r}" in str(error.value) and said in str(
    error.value
  )


def test_a_model_too_small_for_its_tokenizer_is_refused(job):
  import dataclasses

  data = dataclasses.replace(job.run.data, tokenizer="bpe:300")
  with pytest.raises(ValueError, match="model.vocab_size=258 is less than the 300 tok"):
    dataclasses.replace(job.run, data=data)


@pytest.mark.parametrize("order", [1, -1])
def test_a_tokenizer_and_its_model_are_set_in_any_order(job, order):
  settings = ["data.tokenizer=bpe:300", "model.vocab_size=300"][::order]
  run = with_settings(job.run, settings)
  assert (run.data.tokenizer, run.model.vocab_size) == ("bpe:300", 300)


def test_a_prompt_is_encoded_by_itself(bpe):
  text, prompt = b"return self.value", len(b"return se")
  some = tokens.encoded([{"text": text, "domain": 0, "unscored": prompt}], bpe)
  before = int(some.unscored[0])
  lengths = bpe.byte_lengths[some.tokens]
  assert lengths[1 : 1 + before].sum() == prompt
  assert lengths.sum() == len(text)


def test_cached_tokens_are_read_again_and_refused_if_altered(tmp_path, bpe):
  config = Data(max_bytes=20_000, seq=32, batch=4, eval_context=16)
  texts = dataset.load(tmp_path, config)
  first = tokens.load(tmp_path, texts, bpe)
  again = tokens.load(tmp_path, texts, bpe)
  np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
  records = list(texts.train)
  start = 0
  for record, end in zip(records, first.train.ends.tolist(), strict=True):
    np.testing.assert_array_equal(
      first.train.tokens[start:end], bpe.encode(record["text"])
    )
    start = end
  assert first.train.domain.tolist() == [record["domain"] for record in records]
  path = first.train.folder / "tokens.npy"
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  with pytest.raises(BadData, match="are not those that were written; delete"):
    tokens.load(tmp_path, texts, bpe)
  path.write_bytes(data[:-50])
  with pytest.raises(BadData, match="delete this folder"):
    tokens.load(tmp_path, texts, bpe)
