"""Which experts tokens use, token by token: by label, by chance, together, and still.

`uses_TE` is bool[T,E]: token t asks for expert e, in one layer.  Logarithms are
natural.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmoe.analysis.specialisation import Numbers, mutual_information

_ROUNDS, _CLOSE = 10_000, 1e-12  # of fitting


class Stability(NamedTuple):
  """How far two routings of the same tokens are one; fractions."""

  equal: float  # of the tokens, those with the same set of experts in both
  equal_by_chance: float  # the same, if one routing's sets were dealt out at random
  shared: float  # of the choices, those that both make
  shared_by_chance: float


def load(label_T: ArrayLike, uses_TE: ArrayLike, *, num_labels: int) -> NDArray:
  """i64[L,E]: choices of each expert by tokens of each label; see `specialisation`.

  >>> load([0, 1, 1, -1], [[1, 0], [1, 1], [0, 1], [1, 0]], num_labels=2).tolist()
  [[1, 0], [1, 2]]

  Args:
    label_T: i[T] from 0 to L - 1; below 0 for tokens that do not count.
    uses_TE: bool[T,E].
    num_labels: L.

  Raises:
    ValueError: shapes that do not fit, or a label of L or more.
  """
  label_T, uses_TE = np.asarray(label_T), _checked(uses_TE)
  if label_T.shape != uses_TE.shape[:1]:
    raise ValueError(
      f"label has shape {label_T.shape} and uses {uses_TE.shape}; give a label a token."
    )
  if label_T.max(initial=-1) >= num_labels:
    raise ValueError(f"label holds {label_T.max()}; give labels below {num_labels}.")
  token_N, expert_N = np.nonzero(uses_TE & (label_T >= 0)[:, None])
  E = uses_TE.shape[1]
  flat = np.bincount(label_T[token_N] * E + expert_N, minlength=num_labels * E)
  return flat.reshape(num_labels, E)


def information_by_chance(
  unit_T: ArrayLike,
  uses_TE: ArrayLike,
  label_U: ArrayLike,
  *,
  num_labels: int,
  draws: int,
  seed: int = 0,
) -> Numbers:
  """f64[draws] nats: mutual information of experts and labels that were shuffled.

  What labels tell by chance alone: the mean is the bias of `mutual_information`, and
  the largest a bound that chance seldom passes.  Labels change places between units,
  within which tokens are alike: documents, words.  (Shuffled token by token it would be
  `specialisation.miller_madow`, too little for such labels.)

  Args:
    unit_T: i[T] the unit of each token, from 0 to U - 1; below 0: does not count.
    uses_TE: bool[T,E].
    label_U: i[U] from 0 to L - 1.
    num_labels: L.
    draws: how often they are shuffled.
    seed: of the draws.

  Raises:
    ValueError: as of `load`, of units; or a unit's label that is none.
  """
  label_U = np.asarray(label_U, np.int64)
  if label_U.min(initial=0) < 0 or label_U.max(initial=-1) >= num_labels:
    raise ValueError(
      f"label of units is from {label_U.min()} to {label_U.max()}; give labels from 0 "
      f"to num_labels - 1 = {num_labels - 1}."
    )
  # Counted once for all draws; most units use few experts.
  load_UE = load(unit_T, uses_TE, num_labels=len(label_U))
  unit_N, expert_N = np.nonzero(load_UE)
  times_N, E = load_UE[unit_N, expert_N], load_UE.shape[1]
  random, found = np.random.PCG64(seed), []
  for _ in range(draws):
    # Raw bits are the same in every version of NumPy; draws need not be.
    label_N = label_U[np.argsort(random.random_raw(len(label_U)), kind="stable")][
      unit_N
    ]
    flat = np.bincount(label_N * E + expert_N, times_N, minlength=num_labels * E)
    found.append(mutual_information(flat.reshape(num_labels, E)))
  return np.array(found, np.float64)


def pairs(uses_TE: ArrayLike) -> NDArray[np.int64]:
  """i64[E,E]: tokens that use both experts; on the diagonal, those that use one.

  >>> pairs([[1, 1, 0], [1, 0, 1]]).tolist()
  [[2, 1, 1], [1, 1, 0], [1, 0, 1]]
  """
  uses_TE = _checked(uses_TE)
  return np.rint(uses_TE.T.astype(np.float64) @ uses_TE).astype(np.int64)


def lift(pairs_EE: ArrayLike) -> Numbers:
  """f64[E,E]: how often two experts are used together, against independence.

  1: as often as their loads alone make it, 0: never.  A token cannot choose an expert
  twice, so plain products of loads expect pairs that cannot be, and experts chosen at
  random would seem to shun each other ((k-1)E / k(E-1), about a half for k=2).
  Expected is therefore `a_i a_j` off the diagonal, fitted so that every expert has as
  many partners as it has (quasi-independence, Goodman 1968).  nan on the diagonal, and
  where an expert has no partner at all.

  >>> even = lift([[9, 3, 3, 3], [3, 9, 3, 3], [3, 3, 9, 3], [3, 3, 3, 9]])
  >>> print(even.round(6)[0])
  [nan  1.  1.  1.]

  Args:
    pairs_EE: of `pairs`; the diagonal is not read.

  Raises:
    ValueError: not a symmetric matrix of counts.
  """
  pairs_EE = np.asarray(pairs_EE, np.float64)
  shape = pairs_EE.shape
  if len(shape) != 2 or shape[0] != shape[1] or not (pairs_EE == pairs_EE.T).all():
    raise ValueError(f"pairs has shape {shape}; give the symmetric counts of `pairs`.")
  apart_EE = 1.0 - np.eye(len(pairs_EE))
  partners_E = (pairs_EE * apart_EE).sum(1)
  a_E = np.sqrt(partners_E / max(np.sqrt(partners_E.sum()), 1.0))
  for _ in range(_ROUNDS):
    reached_E = a_E * (apart_EE @ a_E)
    ratio_E = np.divide(
      partners_E, reached_E, out=np.ones_like(a_E), where=reached_E > 0
    )
    a_E *= np.sqrt(ratio_E)
    if np.abs(ratio_E - 1).max() < _CLOSE:
      break
  expected_EE = np.outer(a_E, a_E) * apart_EE
  none = np.full(shape, np.nan)
  return np.divide(pairs_EE, expected_EE, out=none, where=expected_EE > 0)


def stability(one_TE: ArrayLike, other_TE: ArrayLike) -> Stability:
  """How many tokens have the same experts in two routings, and how many would.

  By chance: the mean over all ways to deal the second routing's sets to tokens, which
  keeps how often each set is used: `sum_s n_s m_s / T^2` for sets, `sum_e n_e m_e / T`
  choices for experts.

  >>> stability([[1, 0], [0, 1]], [[1, 0], [1, 0]])
  Stability(equal=0.5, equal_by_chance=0.5, shared=0.5, shared_by_chance=0.5)

  Args:
    one_TE: bool[T,E] of one checkpoint.
    other_TE: bool[T,E] of another, of the same tokens.

  Raises:
    ValueError: shapes that differ, or no tokens.
  """
  one_TE, other_TE = _checked(one_TE), _checked(other_TE)
  if one_TE.shape != other_TE.shape or not len(one_TE):
    raise ValueError(
      f"stability of {one_TE.shape} and {other_TE.shape}: give two routings of the "
      "same tokens, one or more, among the same experts."
    )
  T = len(one_TE)
  both = np.packbits(np.concatenate([one_TE, other_TE]), axis=1)
  _, set_2T = np.unique(both, axis=0, return_inverse=True)
  set_2T = set_2T.reshape(-1)  # NumPy 2.0 gives a column
  number = int(set_2T.max()) + 1
  n_S, m_S = (
    np.bincount(x, minlength=number).astype(np.float64)
    for x in (set_2T[:T], set_2T[T:])
  )
  n_E, m_E = one_TE.sum(0, dtype=np.float64), other_TE.sum(0, dtype=np.float64)
  choices = max((n_E.sum() + m_E.sum()) / 2, 1.0)
  return Stability(
    float((set_2T[:T] == set_2T[T:]).mean()),
    float((n_S * m_S).sum() / T**2),
    float((one_TE & other_TE).sum() / choices),
    float((n_E * m_E).sum() / T / choices),
  )


def _checked(uses: ArrayLike) -> NDArray[np.bool_]:
  uses = np.asarray(uses)
  if uses.ndim != 2 or uses.shape[1] == 0:
    raise ValueError(f"uses has shape {uses.shape}; give bool[tokens, experts].")
  return uses.astype(bool)
