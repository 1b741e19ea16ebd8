"""Rated texts for an encoder: which train, choose and test, and what their labels are.

Positive is a mean rating of 0.5 and more, negative -0.5 and less; what lies between is
left out.  A hash of its tokens says where a text belongs, so equal texts go together.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import hashlib

import numpy as np

from experiments.emoe.jobs import TASKS
from experiments.emoe.material import Material, Split
from experiments.emoe.pack import FILES, Pack
from jmoe.convert import bert
from jmoe.surgery.encoders import EncoderModel


def split(pack: Pack, task: str) -> Split:
  """The texts of a task.

  Args:
    pack: all texts.
    task: "film": film snippets train; "conflict": half film snippets, half Amazon
      sentences with their labels inverted, so that the same words ask for opposite
      answers by domain.
  """
  domains, trained = list(FILES), TASKS[task]
  kept_M = np.abs(pack.rating_M) >= 0.5
  part_M = np.array([_part(row) for row in pack.tokens_MS])

  def some(domain: str, low: int, high: int) -> np.ndarray:
    own_M = pack.domain_M == domains.index(domain)
    return np.flatnonzero(own_M & kept_M & (part_M >= low) & (part_M < high))

  return Split(
    {domain: some(domain, 30, 100) for domain in trained},
    np.concatenate([some(domain, 0, 10) for domain in trained]),
    # Where a domain trains nothing all of its texts test.
    {d: some(d, 10, 30) if d in trained else some(d, 0, 100) for d in domains},
  )


def labels(pack: Pack, task: str) -> np.ndarray:
  """i32[M], 0 or 1."""
  label_M = (pack.rating_M > 0).astype(np.int32)
  if task != "conflict":
    return label_M
  inverted_M = pack.domain_M == list(FILES).index("amazon")
  return np.where(inverted_M, 1 - label_M, label_M).astype(np.int32)


def material(pack: Pack) -> Material:
  """The pretrained encoder and the texts of all tasks."""
  # The tables of tokens that no text has are dead weight in every moment.
  used, tokens = np.unique(pack.tokens_MS, return_inverse=True)
  assert used[0] == 0, "padding is token 0"
  tokens_MS = tokens.reshape(pack.tokens_MS.shape).astype(np.int32)
  dense = bert.from_released(pack.config, pack.tensors)
  return Material(
    _of_words(dense, used, pack.tokens_MS.shape[1]),
    {task: split(pack, task) for task in TASKS},
    {task: {"tokens": tokens_MS, "label": labels(pack, task)} for task in TASKS},
    np.ones(len(tokens_MS)),
    "accuracy",
  )


def _of_words(model: EncoderModel, used: np.ndarray, longest: int) -> EncoderModel:
  """The encoder with the rows of its tables that are read."""
  params = dict(model.params)
  params["words.embedding"] = params["words.embedding"][used]
  params["positions.embedding"] = params["positions.embedding"][:longest]
  config = dataclasses.replace(
    model.config, vocab_size=len(used), max_positions=longest
  )
  return EncoderModel(config, params)


def _part(row_S: np.ndarray) -> int:
  """Which hundredth of all texts."""
  return hashlib.sha256(row_S.astype("<i4").tobytes()).digest()[0] * 100 // 256
