"""Means over seeds and how far they can be trusted."""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import special

_Seed = TypeVar("_Seed")


class Interval(NamedTuple):
  """A mean with its 95 % interval, which takes two values or more."""

  mean: float
  low: float | None
  high: float | None
  deviation: float | None  # standard, of one value; n - 1 in the denominator
  count: int


def student(values: Sequence[float]) -> Interval:
  """The mean, and Student's 95 % interval of it: mean +- t(0.975, n-1) * s / sqrt(n).

  Raises:
    ValueError: there is no value, or one is not finite.

  >>> [round(x, 3) for x in student([1.0, 2.0, 3.0])]
  [2.0, -0.484, 4.484, 1.0, 3]
  """
  if not len(values) or not all(map(math.isfinite, values)):
    raise ValueError(f"values={list(values)}; give at least one, all finite.")
  array = np.asarray(values, np.float64)
  mean, count = float(array.mean()), len(array)
  if count < 2:
    return Interval(mean, None, None, None, count)
  deviation = float(array.std(ddof=1))
  half = float(special.stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
  return Interval(mean, mean - half, mean + half, deviation, count)


def geometric(values: Sequence[float]) -> Interval:
  """The same for ratios: mean and interval of their logarithms, brought back.

  The deviation is a factor then.

  Raises:
    ValueError: a value is not a finite number over 0.
  """
  if any(not value > 0 for value in values):
    raise ValueError(f"values={list(values)}; ratios must be over 0.")
  logs = student([math.log(value) for value in values])
  low, high, deviation = (None if x is None else math.exp(x) for x in logs[1:4])
  return Interval(math.exp(logs.mean), low, high, deviation, logs.count)


def paired(one: Mapping[_Seed, float], other: Mapping[_Seed, float]) -> Interval | None:
  """`student` of one - other over the seeds that both have; None if they share none."""
  shared = [seed for seed in one if seed in other]
  if not shared:
    return None
  return student([one[seed] - other[seed] for seed in shared])


def pooled_deviations(one: Sequence[float], other: Sequence[float]) -> float | None:
  """The gap of two means in pooled standard deviations of one value.

  None with fewer than two values on a side, or if no value varies.
  """
  a, b = student(one), student(other)
  if a.deviation is None or b.deviation is None:
    return None
  squares = (a.count - 1) * a.deviation**2 + (b.count - 1) * b.deviation**2
  pooled = math.sqrt(squares / (a.count + b.count - 2))
  return abs(a.mean - b.mean) / pooled if pooled else None


def shown(interval: Interval, digits: int = 3, unit: str = "") -> str:
  """'1.234 [1.2, 1.3]', or the mean alone.

  >>> shown(student([1.0, 2.0, 3.0]), 1), shown(student([2.0]))
  ('2.0 [-0.5, 4.5]', '2.000')
  """
  text = f"{interval.mean:.{digits}f}{unit}"
  if interval.low is None:
    return text
  return f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def jsonable(interval: Interval | None) -> dict[str, Any] | None:
  """As JSON takes it."""
  return None if interval is None else interval._asdict()
