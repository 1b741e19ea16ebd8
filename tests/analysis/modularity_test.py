"""Shares that groups hold, against loops over tokens and groups."""
# SPDX-License-Identifier: Apache-2.0

import jax
import numpy as np
import pytest

from jmoe.analysis import modularity
from jmoe.surgery.cluster import balanced
from tests.tolerance import assert_close

R = np.random.default_rng(0)
D, F, N, T = 6, 12, 4, 9
MATRICES = {
  "up": R.normal(size=(D, F)).astype(np.float32),
  "gate": R.normal(size=(D, F)).astype(np.float32),
  "down": R.normal(size=(F, D)).astype(np.float32),
}
X = R.normal(size=(T, D)).astype(np.float32)
ORDER = R.permutation(F)


def oracle(matrices, k):
  groups = ORDER.reshape(N, -1)
  shares, errors, best = [], [], []
  for x in X.astype(np.float64):
    up = x @ matrices["up"] + matrices.get("up_bias", 0)
    if "gate" in matrices:
      gate = x @ matrices["gate"]
      hidden = gate / (1 + np.exp(-gate)) * up
    else:
      hidden = up / (1 + np.exp(-up))
    parts = [hidden[g] @ matrices["down"][g] for g in groups]
    y = sum(parts)
    keys = matrices.get("gate", matrices["up"])
    score = [x @ keys[:, g].mean(1) for g in groups]
    kept = sum(parts[g] for g in np.argsort(score)[::-1][:k])
    shares.append(kept @ y / (y @ y))
    errors.append(np.linalg.norm(y - kept) / np.linalg.norm(y))
    best.append(sum(sorted((p @ y / (y @ y) for p in parts), reverse=True)[:k]))
  return np.mean([shares, errors, best], axis=1)


@pytest.mark.parametrize("kind", ["gated", "biased"])
def test_equals_the_definition(kind):
  matrices = dict(MATRICES)
  if kind == "biased":
    del matrices["gate"]
    matrices["up_bias"] = R.normal(size=F).astype(np.float32)
  found = modularity.held(
    matrices, X, ORDER, activation=jax.nn.silu, num_groups=N, ks=[1, 2, N]
  )
  for held in found:
    expected = oracle(matrices, held.k).astype(np.float32)
    assert_close(np.float32([held.share, held.error, held.best]), expected)
  assert_close(np.float32([found[2].share, found[2].error]), np.float32([1, 0]))


def test_clusters_that_are_there_hold_more_than_random_groups():
  """Units of a group look the same way; a token of that way finds its group."""
  ways = np.linalg.qr(R.normal(size=(8, 8)))[0][:4]
  label = np.repeat(np.arange(4), 6)
  R.shuffle(label)
  up = (ways[label] + 0.1 * R.normal(size=(24, 8))).T
  matrices = {"up": 2 * up, "down": R.normal(size=(24, 8))}
  x = ways[R.integers(0, 4, 50)]
  orders = np.argsort(balanced(up.T, 4), kind="stable"), R.permutation(24)
  given = dict(activation=jax.nn.relu, num_groups=4, ks=[1])
  own, other = (modularity.held(matrices, x, order, **given)[0] for order in orders)
  assert own.share > 0.8 > 0.6 > other.share


def test_mistakes_are_named():
  for fields in (dict(num_groups=5), dict(ks=[0]), dict(ks=[5])):
    given = dict(activation=jax.nn.silu, num_groups=N, ks=[1]) | fields
    with pytest.raises(ValueError, match="give tokens, a divisor"):
      modularity.held(MATRICES, X, ORDER, **given)
