"""How much of a feed-forward's output a few groups of its hidden units hold."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Held(NamedTuple):
  """Means over tokens, of k groups a token.

  `share` is `<y_k, y> / <y, y>` with y the whole output and y_k that of the chosen
  groups: shares of all groups sum to one.  `error` is `|y - y_k| / |y|`.
  """

  k: int
  share: float  # chosen by the means of their keys, as EMoE does
  error: float
  best: float  # share of the k groups that have most of it: no choice has more


def held(
  matrices: Mapping[str, Any],
  x_TD: Any,
  order_F: Any,
  *,
  activation: Callable[..., Any],
  num_groups: int,
  ks: Sequence[int],
) -> list[Held]:
  """Of a dense feed-forward, cut into groups of equal size.

  Args:
    matrices: as for `surgery.cluster.split`; a bias after `down` is nobody's.
    x_TD: f[T,D] what it is given; tokens of any text.
    order_F: i[F] hidden units, group by group.
    activation: of the feed-forward.
    num_groups: N.
    ks: numbers of groups that are chosen.

  Returns:
    One for each k.

  Raises:
    ValueError: no tokens, N does not divide F, or a k over N.
  """
  x_TD, F = np.asarray(x_TD, np.float32), len(order_F)
  if not len(x_TD) or F % num_groups or not all(0 < k <= num_groups for k in ks):
    raise ValueError(
      f"held: {len(x_TD)} tokens, num_groups={num_groups} of {F} hidden units, "
      f"ks={list(ks)}; give tokens, a divisor, and ks from 1 to it."
    )
  w = {name: np.asarray(x, np.float32) for name, x in matrices.items()}
  hidden_TF = x_TD @ w["up"] + w.get("up_bias", 0)
  if "gate" in w:
    gate_TF = x_TD @ w["gate"] + w.get("gate_bias", 0)
    hidden_TF = np.asarray(activation(jnp.asarray(gate_TF))) * hidden_TF
  else:
    hidden_TF = np.asarray(activation(jnp.asarray(hidden_TF)))
  hidden_TF, down_FD = hidden_TF[:, order_F], w["down"][order_F]
  y_TD = hidden_TF @ down_FD
  square_T = np.maximum((y_TD**2).sum(1), 1e-30)
  unit_TF = hidden_TF * (y_TD @ down_FD.T) / square_T[:, None]
  T = len(x_TD)
  share_TN = unit_TF.reshape(T, num_groups, -1).sum(2)
  keys_DF = w.get("gate", w["up"])[:, order_F]
  mean_DN = keys_DF.reshape(len(keys_DF), num_groups, -1).mean(2)
  by_gate = np.argsort(-(x_TD @ mean_DN), axis=1, kind="stable")
  found = []
  for k in ks:
    chosen_TN = np.zeros((T, num_groups), np.float32)
    np.put_along_axis(chosen_TN, by_gate[:, :k], 1, axis=1)
    kept_TF = hidden_TF * np.repeat(chosen_TN, F // num_groups, axis=1)
    rest_TD = y_TD - kept_TF @ down_FD
    found.append(
      Held(
        k,
        float((share_TN * chosen_TN).sum(1).mean()),
        float(np.sqrt((rest_TD**2).sum(1) / square_T).mean()),
        float(np.sort(share_TN, axis=1)[:, num_groups - k :].sum(1).mean()),
      )
    )
  return found
