"""What models are tuned on and asked about, whatever their kind."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import BadData
from jmoe.surgery import Model
from jmoe.surgery.encoders import EncoderModel


class Split(NamedTuple):
  """Numbers of texts, or of rows of text."""

  train: dict[str, np.ndarray]  # by domain: of which each seed draws its own
  choose: np.ndarray  # in the domains that train
  test: dict[str, np.ndarray]


class Material(NamedTuple):
  """A model before its tuning, and all texts."""

  dense: EncoderModel | Model
  splits: Mapping[str, Split]  # by task
  rows: Mapping[str, Mapping[str, Any]]  # by task: arrays with a leading [M]
  worth_M: np.ndarray  # f64[M]: a mean is a sum over texts by the sum of these
  measure: str  # of `table.MEASURES`


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
