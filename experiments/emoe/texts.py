"""Which texts train, choose and test, and what their labels are.

Positive is a mean rating of 0.5 and more, negative -0.5 and less; what lies between is
left out.  A hash of its tokens says where a text belongs, so equal texts go together.
"""
# SPDX-License-Identifier: Apache-2.0

import hashlib
from typing import NamedTuple

import numpy as np

from experiments.emoe.pack import FILES, Pack
from experiments.errors import BadData

TASKS = ("film", "conflict")


class Split(NamedTuple):
  """Numbers of texts of a pack."""

  train: dict[str, np.ndarray]  # by domain: of which each seed draws its own
  choose: np.ndarray  # in the domains that train
  test: dict[str, np.ndarray]
  label_M: np.ndarray  # i32[M]


def split(pack: Pack, task: str) -> Split:
  """The texts of a task.

  Args:
    pack: all texts.
    task: "film": film snippets train; "conflict": half film snippets, half Amazon
      sentences with their labels inverted, so that the same words ask for opposite
      answers by domain.
  """
  domains = list(FILES)
  kept_M = np.abs(pack.rating_M) >= 0.5
  label_M = (pack.rating_M > 0).astype(np.int32)
  trained = ["film"]
  if task == "conflict":
    trained.append("amazon")
    inverted_M = pack.domain_M == domains.index("amazon")
    label_M = np.where(inverted_M, 1 - label_M, label_M).astype(np.int32)
  part_M = np.array([_part(row) for row in pack.tokens_MS])

  def some(domain: str, low: int, high: int) -> np.ndarray:
    own_M = pack.domain_M == domains.index(domain)
    return np.flatnonzero(own_M & kept_M & (part_M >= low) & (part_M < high))

  return Split(
    {domain: some(domain, 30, 100) for domain in trained},
    np.concatenate([some(domain, 0, 10) for domain in trained]),
    # Where a domain trains nothing all of its texts test.
    {d: some(d, 10, 30) if d in trained else some(d, 0, 100) for d in domains},
    label_M,
  )


def order(
  parts: Split, *, seed: int, examples: int, batch: int, epochs: int
) -> np.ndarray:
  """i32[steps,batch]: the texts of every step of a seed, the same for all arms.

  Raises:
    BadData: more examples than there are, or too few for a step.
  """
  random = np.random.default_rng([seed, 0])
  each = examples // len(parts.train)
  rows_in_all = epochs * each * len(parts.train)
  if not 0 < batch <= rows_in_all:
    raise BadData(
      f"--examples {examples} --epochs {epochs} --batch {batch}: no step; give a batch "
      "of at least 1, and epochs times examples of at least a batch."
    )
  drawn = []
  for domain, numbers in parts.train.items():
    if each > len(numbers):
      raise BadData(
        f"--examples {examples}: {domain} has {len(numbers)} texts to train; give "
        f"{len(numbers) * len(parts.train)} or fewer."
      )
    drawn.append(random.permutation(numbers)[:each])
  own = np.concatenate(drawn)
  rows = [random.permutation(own) for _ in range(epochs)]
  steps = rows_in_all // batch
  return np.concatenate(rows)[: steps * batch].reshape(steps, batch).astype(np.int32)


def _part(row_S: np.ndarray) -> int:
  """Which hundredth of all texts."""
  return hashlib.sha256(row_S.astype("<i4").tobytes()).digest()[0] * 100 // 256
