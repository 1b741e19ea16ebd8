"""Compute to equal loss: how many times fewer FLOPs one run needs than another.

With F the training FLOPs up to a step, and S(F) the mean of the bits per byte of the
steps within ((1 - w) F, F], w = 0.1:

  better   the run whose last S is lower; L is the last S of the other one
  F*       FLOPs from which on S of the better run stays at L or under it
  factor   (all FLOPs of the other run) / F*

The window grows with F, so that a curve that is another one at r times less compute,
S_a(F) = S_b(r F), gives r, whatever its shape.  "Stays" rather than "first reaches":
noise that dips early must not count.  Learning rates fall to the end of a run, so that
a run which passes L on the way was not planned to end there; `experiments.claims` also
compares runs that were.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import numpy as np

WINDOW = 0.1


class Curve(NamedTuple):
  """Training as it went."""

  flops: np.ndarray  # f64[N], growing: spent up to each step
  bits_per_byte: np.ndarray  # f64[N] of each step's batch; not finite if it was skipped


def smoothed(curve: Curve) -> np.ndarray:
  """S of the module's text, f64[N]; nan where no step of the window has a loss."""
  good = np.isfinite(curve.bits_per_byte)
  sums = np.cumsum(np.where(good, curve.bits_per_byte, 0.0))
  counts = np.cumsum(good)
  start = np.searchsorted(curve.flops, (1 - WINDOW) * curve.flops, side="right")
  before = start - 1  # -1: nothing lies before the window
  sums = sums - np.where(before >= 0, sums[before], 0.0)
  counts = counts - np.where(before >= 0, counts[before], 0)
  return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def flops_to_stay(curve: Curve, bits_per_byte: float) -> float | None:
  """F* of the module's text; None if the run ends above.

  Between two steps S is taken as a straight line.
  """
  smooth = smoothed(curve)
  known = np.isfinite(smooth)
  flops, smooth = curve.flops[known], smooth[known]
  (above,) = np.nonzero(smooth > bits_per_byte)
  if not len(above):
    return float(flops[0])
  last = above[-1]
  if last == len(smooth) - 1:
    return None
  way = (smooth[last] - bits_per_byte) / (smooth[last] - smooth[last + 1])
  return float(flops[last] + way * (flops[last + 1] - flops[last]))


def factor(one: Curve, other: Curve) -> float:
  """How many times fewer training FLOPs `one` needs than `other`; under 1 if more.

  Raises:
    ValueError: a curve has no finite loss.
  """
  ends = []
  for curve in (one, other):
    smooth = smoothed(curve)
    smooth = smooth[np.isfinite(smooth)]
    if not len(smooth):
      raise ValueError("a curve without a finite loss has no compute to equal loss.")
    ends.append(float(smooth[-1]))
  if ends[0] > ends[1]:
    return 1 / factor(other, one)
  needed = flops_to_stay(one, ends[1])
  assert needed is not None  # it ends at or under the other's end
  return float(other.flops[-1]) / needed
