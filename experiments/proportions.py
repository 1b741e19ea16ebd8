"""How many of the training tokens are of which domain."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from experiments.errors import BadData

if TYPE_CHECKING:
  from experiments.data import Windows

LEAST = 1e-9  # of the tokens, for a domain


def shares(
  windows: "Windows", temperature: float, fixed: Mapping[int, float] | None = None
) -> np.ndarray:
  """f64[domains] part of the training tokens that is of each domain.

  Args:
    windows: what is drawn from.
    temperature: by which domains share what is not fixed.
    fixed: by number of a domain, its part; 0 leaves it out.

  Raises:
    BadData: a part for a domain without tokens, or parts that leave no domain.
  """
  sizes = windows.tokens_by_domain.astype(np.float64)
  if not fixed:
    return _powers(sizes, temperature)
  for number, part in fixed.items():
    if part and not (number < len(sizes) and sizes[number]):
      raise BadData(
        f"data.shares: domain {number} has {part} of the tokens, but no document to "
        "train on; leave it out."
      )
  named = [number for number in fixed if number < len(sizes)]
  rest = 1 - math.fsum(fixed.values())
  sizes[named] = 0
  found = np.zeros_like(sizes)
  if sizes.any() and rest > LEAST:
    found = rest * _powers(sizes, temperature)
  found[named] = [fixed[number] for number in named]
  if not found.any():
    raise BadData("data.shares leaves no domain to train on; name less in it.")
  return found / found.sum()


def _powers(sizes: np.ndarray, temperature: float) -> np.ndarray:
  # The largest is 1, so that no power is too large.
  powers = np.where(sizes > 0, (sizes / sizes.max()) ** (1 / temperature), 0.0)
  return powers / powers.sum()
