"""Which experts serve which domains: numbers of a map of loads.

A map `load_DE` counts the choices of expert e by tokens of domain d, in one layer; any
leading dims (layers) are kept.  Logarithms are natural, and 0 log 0 is 0.
"""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


def mutual_information(load_DE: ArrayLike) -> Numbers:
  """f64[...] nats: what the domain of a choice tells about its expert.

  `sum_de p_de log(p_de / (p_d p_e))` of the choices that were counted: 0 if all domains
  use experts alike, the entropy of domains if no two share an expert.  Counts of few
  tokens give more than the truth, by about (D-1)(E-1) / 2N nats for N choices (Miller
  1955).

  >>> print(mutual_information([[5, 5], [5, 5]]), mutual_information([[7, 0], [0, 7]]))
  0.0 0.6931471805599453

  Raises:
    ValueError: not a map of counts.
  """
  p_DE = _shares_of_all(_checked(load_DE))
  joint = _entropy(p_DE.reshape(*p_DE.shape[:-2], -1))
  information = _entropy(p_DE.sum(-1)) + _entropy(p_DE.sum(-2)) - joint
  return np.maximum(information, 0.0)  # rounding may leave less


def miller_madow(load_DE: ArrayLike) -> Numbers:
  """f64[...] nats that chance adds to `mutual_information`, if choices are independent.

  `(D-1)(E-1) / 2N` of N choices, of the D domains and E experts that have any (Miller
  1955).  Tokens of one document are not independent, so that chance adds more where
  domains are whole documents: see `routes.information_by_chance`.

  >>> print(miller_madow([[3, 1, 0], [2, 4, 0]]))
  0.05
  """
  load_DE = _checked(load_DE)
  domains = (load_DE.sum(-1) > 0).sum(-1)
  experts = (load_DE.sum(-2) > 0).sum(-1)
  total = load_DE.sum((-2, -1))
  free = np.maximum(domains - 1, 0) * np.maximum(experts - 1, 0)
  return free / (2 * np.where(total > 0, total, 1.0))


def normalised_mutual_information(load_DE: ArrayLike) -> Numbers:
  """f64[...] mutual information by the entropy of domains: 0 to 1.

  With fewer experts than domains, one cannot be reached.  Zero for a single domain.
  """
  domains = _entropy(_shares_of_all(_checked(load_DE)).sum(-1))
  information = mutual_information(load_DE)
  return np.minimum(information / np.where(domains > 0, domains, 1.0), 1.0)


def domain_shares(load_DE: ArrayLike) -> Numbers:
  """f64[...,D,E] of each domain's choices, the share of each expert; rows sum to one.

  A domain without choices has a row of zeros.

  >>> print(domain_shares([[3, 1], [0, 0]]))
  [[0.75 0.25]
   [0.   0.  ]]
  """
  return _shares(_checked(load_DE))


def similarity(load_DE: ArrayLike) -> Numbers:
  """f64[...,D,D] how alike two domains use experts: `sum_e min(share_ae, share_be)`.

  The share of choices that one domain could leave to the other's experts: 1 if both use
  them alike, 0 if they have none in common, and 0 with a domain without choices.
  """
  share_DE = domain_shares(load_DE)
  return np.minimum(share_DE[..., :, None, :], share_DE[..., None, :, :]).sum(-1)


def cosine(load_DE: ArrayLike) -> Numbers:
  """f64[...,D,D] cosine between the loads of two domains: EMO's measure.

  Wang, Bhagia, Min 2026, arXiv 2605.06663, of documents' or domains' use of experts.  1
  if both use experts alike, 0 if they share none; 0 with a domain without choices.

  >>> print(cosine([[3, 4, 0], [0, 0, 2]]))
  [[1. 0.]
   [0. 1.]]
  """
  load_DE = _checked(load_DE)
  length_D1 = np.linalg.norm(load_DE, axis=-1, keepdims=True)
  unit_DE = load_DE / np.where(length_D1 > 0, length_D1, 1.0)
  return np.minimum(unit_DE @ np.swapaxes(unit_DE, -1, -2), 1.0)


def dead_experts(load_E: ArrayLike, *, below: float = 0.01) -> NDArray[np.bool_]:
  """bool[...,E]: whose load is less than `below` of an even one.

  >>> dead_experts([100, 99, 0, 1]).tolist()
  [False, False, True, False]

  Args:
    load_E: counts, of all domains together.
    below: fraction of the mean load.

  Raises:
    ValueError: `below` is not from 0 to 1, or not counts.
  """
  if not 0 <= below <= 1:
    raise ValueError(f"dead_experts: below={below!r}; give a fraction from 0 to 1.")
  load_E = _checked(load_E, least=1)
  return load_E < below * load_E.mean(-1, keepdims=True)


def skew(load_E: ArrayLike) -> Numbers:
  """f64[...] the busiest expert's load by the mean: 1 at balance, E if one has all.

  Without any load it is 1.
  """
  load_E = _checked(load_E, least=1)
  mean = load_E.mean(-1)
  return np.where(mean > 0, load_E.max(-1) / np.where(mean > 0, mean, 1.0), 1.0)


def load_entropy(load_E: ArrayLike) -> Numbers:
  """f64[...] nats: entropy of the load; log E at balance, 0 if one expert has all.

  >>> print(load_entropy([8, 0, 0]), load_entropy([4, 4]))
  0.0 0.6931471805599453
  """
  return _entropy(_shares(_checked(load_E, least=1)))


def _checked(load: ArrayLike, least: int = 2) -> Numbers:
  load = np.asarray(load, np.float64)
  if load.ndim < least or load.size == 0:
    shape = "[domains, experts]" if least == 2 else "[experts]"
    raise ValueError(f"load has shape {load.shape}; give counts shaped {shape}.")
  if not np.isfinite(load).all() or (load < 0).any():
    raise ValueError("load holds a number that is no count; give numbers >= 0.")
  return load


def _shares(load: Numbers) -> Numbers:
  total = load.sum(-1, keepdims=True)
  return load / np.where(total > 0, total, 1.0)


def _shares_of_all(load_DE: Numbers) -> Numbers:
  flat = load_DE.reshape(*load_DE.shape[:-2], -1)
  return _shares(flat).reshape(load_DE.shape)


def _entropy(p: Numbers) -> Numbers:
  return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1) + 0.0  # no minus zero
