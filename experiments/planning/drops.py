"""Popularity of experts under a stated skew, and what overflows their slots.

Tokens choose independently and an expert at most once, so an expert that a token
chooses with probability p has a binomial load, Bin(T, p), whatever the other experts'
are.  What overflows C slots on average is exact:

  E[(L - C)+] = T p P(Bin(T-1, p) >= C) - C P(L > C)
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import numpy as np
from scipy import special, stats

_POINTS = 400  # of the integral over a token's k-th best draw


@functools.lru_cache(maxsize=32)
def popularity(num_experts: int, k: int, skew: float) -> np.ndarray:
  """f64[E] probability that a token chooses an expert; they sum to k.

  A token takes the k largest of `skew * z_e` plus Gumbel noise, z_e at the quantiles of
  a normal distribution: `skew` is the standard deviation of the log of popularity (0.3:
  the routing of experiments/benchmarks; 0: uniform).  In the order of a fixed shuffle.

  Args:
    num_experts: E.
    k: choices of a token.
    skew: at least 0.
  """
  if not skew or k == num_experts:
    return np.full(num_experts, k / num_experts)
  z_E = stats.norm.ppf((np.arange(num_experts) + 0.5) / num_experts)
  weight_E = np.exp(skew * np.random.default_rng(0).permutation(z_E))
  return chosen(weight_E, k)


def chosen(weight_E: np.ndarray, k: int) -> np.ndarray:
  """f64[E] probability to be among k drawn one after another without replacement.

  Expert e is drawn at an exponential time of rate w_e; it is among the first k if fewer
  than k others came before.  That count is a sum of independent events at a given time,
  so the integral over its own time is one of polynomials' coefficients.

  Args:
    weight_E: positive; the chance to be drawn first is in proportion.
    k: how many are drawn.
  """
  weight_E = weight_E / weight_E.sum()
  # u = exp(-t) of a time in which all weights together have rate one.
  nodes, shares = special.roots_legendre(_POINTS)
  # Of s in (0, 1): a token's own draw comes at t with 1 - exp(-w t) = s.
  s_Q, share_Q = (nodes + 1) / 2, shares / 2
  time_EQ = -np.log1p(-s_Q)[None, :] / weight_E[:, None]
  count_EQK = np.zeros((len(weight_E), _POINTS, k))
  count_EQK[:, :, 0] = 1
  for other, weight in enumerate(weight_E):
    before_EQ = -np.expm1(-weight * time_EQ)
    before_EQ[other] = 0  # an expert does not come before itself
    moved = count_EQK[:, :, :-1] * before_EQ[:, :, None]
    count_EQK *= 1 - before_EQ[:, :, None]
    count_EQK[:, :, 1:] += moved
  found_E = count_EQK.sum(2) @ share_Q
  return found_E * (k / found_E.sum())  # the quadrature's error, 1e-6 of it


def overflow(tokens: int, chance: np.ndarray, slots: int) -> np.ndarray:
  """Mean assignments beyond the slots of experts, shaped like `chance`.

  Args:
    tokens: T of a group.
    chance: that a token chooses the expert.
    slots: C.
  """
  if slots <= 0:
    return tokens * chance
  if slots >= tokens:
    return np.zeros_like(chance)
  more = stats.binom.sf(slots - 1, tokens - 1, chance)  # P(Bin(T-1, p) >= C)
  full = stats.binom.sf(slots, tokens, chance)
  return np.maximum(tokens * chance * more - slots * full, 0.0)


def dropped(tokens: int, chance_E: np.ndarray, slots: int) -> float:
  """Fraction of assignments that find no slot, on average."""
  return float(overflow(tokens, chance_E, slots).sum() / (tokens * chance_E.sum()))


def busiest(chance_E: np.ndarray, devices: int) -> float:
  """Rows of the busiest of `devices` over the mean, experts in order, on average."""
  return float(chance_E.reshape(devices, -1).sum(1).max() * devices / chance_E.sum())


def distinct(chance_E: np.ndarray, devices: int) -> float:
  """Devices that hold any of a token's experts, on average.

  As if each expert were chosen by itself, given that k are: exact where popularity is
  uniform.

  Args:
    chance_E: that a token chooses an expert; they sum to k.
    devices: that share experts equally, in order.
  """
  k = round(float(chance_E.sum()))
  if k >= len(chance_E):
    return float(devices)
  odds_DE = (chance_E / (1 - np.minimum(chance_E, 1 - 1e-9))).reshape(devices, -1)
  every = _of_k(odds_DE.reshape(-1), k)
  missed = [
    _of_k(np.delete(odds_DE, device, axis=0).reshape(-1), k) / every
    for device in range(devices)
  ]
  return float(devices - sum(missed))


def _of_k(odds_E: np.ndarray, k: int) -> float:
  """The sum over all sets of k of the product of their odds."""
  sums = np.zeros(k + 1)
  sums[0] = 1.0
  for odds in odds_E:
    sums[1:] = sums[1:] + odds * sums[:-1]
  return float(sums[k])
