"""The oracle's scores, experts and losses against values worked by hand."""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest

from tests import oracle

# Four tokens, three experts.  First choices 0, 0, 1, 0; second choices 1, 2, 0, 1.
SCORES = np.array(
  [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.45, 0.35, 0.2]]
)


def test_scores():
  np.testing.assert_allclose(oracle.softmax([1e4, 1e4]), [0.5, 0.5])
  np.testing.assert_allclose(oracle.sigmoid([0.0, -50.0]), [0.5, math.exp(-50)])
  assert oracle.relu([-1.0, 2.0]).tolist() == [0, 2]
  np.testing.assert_allclose(oracle.sqrt_softplus([0.0]), math.sqrt(math.log(2)))


def test_experts():
  x = np.array([1.0, -2.0])
  eye = np.eye(2)
  np.testing.assert_allclose(oracle.mlp(eye, eye, oracle.relu)(x), [1, 0])
  np.testing.assert_allclose(
    oracle.mlp(eye, eye, oracle.relu, [0, 3], [5, 0])(x), [6, 1]
  )
  np.testing.assert_allclose(oracle.glu(eye, 3 * eye, eye, oracle.identity)(x), [3, 12])
  np.testing.assert_allclose(
    oracle.silu(x), [1 / (1 + math.exp(-1)), -2 / (1 + math.e**2)]
  )
  np.testing.assert_allclose(oracle.gelu_exact(x), [0.841345, -0.045500], atol=1e-6)
  np.testing.assert_allclose(oracle.gelu(x), [0.841192, -0.045402], atol=1e-6)
  assert oracle.copy(x).tolist() == [1, -2]
  assert oracle.zero(x).tolist() == [0, 0]
  np.testing.assert_allclose(oracle.constant(np.zeros((2, 2)), [3, 4])(x), [2, 1])


def test_gpt_oss_glu_interleaves_clamps_and_adds_one():
  # Columns gate, up; one hidden unit.
  for x, gate, up in ((2.0, 2.0, -6.0), (100.0, 7.0, -7.0), (-9.0, -9.0, 7.0)):
    y = oracle.gpt_oss_glu([[1.0, -3.0]], [[1.0]], down_bias=[0.5])(np.array([x]))
    np.testing.assert_allclose(
      y, [(up + 1) * gate / (1 + math.exp(-1.702 * gate)) + 0.5]
    )


@pytest.mark.parametrize("choices", ["first", "all"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balance_is_one_at_perfect_balance(choices, score):
  logits = np.array([[3, 2, 0, 0], [0, 3, 2, 0], [0, 0, 3, 2], [2, 0, 0, 3]])
  scores = oracle.SCORES[score](logits)
  entries = oracle.top_k(logits, scores, scores, 2)
  loss = oracle.load_balance(entries, scores, choices=choices)
  np.testing.assert_allclose(loss, 1.0)


def test_load_balance_by_hand():
  entries = oracle.top_k(SCORES, SCORES, SCORES, 2)
  mean_p = [1.75 / 4, 1.45 / 4, 0.8 / 4]
  all_k = 3 * np.dot([4 / 8, 3 / 8, 1 / 8], mean_p)
  first = 3 * np.dot([3 / 4, 1 / 4, 0], mean_p)
  np.testing.assert_allclose(oracle.load_balance(entries, SCORES), all_k)
  np.testing.assert_allclose(
    oracle.load_balance(entries, SCORES, choices="first"), first
  )
  # A skipped second choice does not count, even if it holds a slot.
  entries = oracle.top_2(SCORES, "none", skipped_holds_slot=True)
  np.testing.assert_allclose(oracle.load_balance(entries, SCORES), first)
  # All to one expert: E.  Per scope, a scope of padding only does not count.
  one = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  for valid, scope, loss in (
    ([True, True, False], None, 2.0),
    ([True, True, False], [0, 0, 1], 2.0),
    ([True, False, True], None, 1.0),
    ([True, False, True], [0, 0, 1], 2.0),
    ([False] * 3, None, 0.0),
  ):
    entries = oracle.top_k(one, one, one, 1, valid=valid)
    assert oracle.load_balance(entries, one, valid, scope=scope) == loss


def test_importance_and_load():
  assert oracle.importance(np.full((4, 3), 1 / 3)) == 0
  np.testing.assert_allclose(oracle.importance([[1.0, 0.0], [1.0, 0.0]]), 1.0)
  np.testing.assert_allclose(oracle.importance([[1.0, 0.0], [0.0, 1.0]]), 0.0)
  per_group = oracle.importance([[1.0, 0.0], [0.0, 1.0]], scope=[0, 1])
  np.testing.assert_allclose(per_group, 1.0)
  assert oracle.importance([[1.0, 0.0]], valid=[False]) == 0
  assert oracle.load_vmoe(np.zeros((3, 4)), np.zeros((3, 4)), 2) == 0
  # sigma = 1/2, threshold 1: chances 1 - Phi(0) = .5 and 1 - Phi(2) = .02275.
  a, b = 0.5, 0.0227501
  expected = ((a - b) / (a + b)) ** 2
  loss = oracle.load_vmoe([[1.0, 0.0]], [[1.0, 0.5]], 1)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_router_z():
  np.testing.assert_allclose(oracle.router_z(np.zeros((5, 7))), math.log(7) ** 2)
  z = oracle.router_z([[1e4, 1e4], [0.0, 0.0]], valid=[False, True])
  np.testing.assert_allclose(z, math.log(2) ** 2)
  assert oracle.router_z([[1.0]], valid=[False]) == 0


def test_entropies():
  uniform, same = np.full((3, 4), 0.25), np.eye(4)[[0, 0, 0]]
  log_e, tau = math.log(4), math.log(2)
  np.testing.assert_allclose(oracle.entropy_local(uniform), log_e)
  np.testing.assert_allclose(oracle.entropy_global(uniform), -log_e)
  assert oracle.entropy_global(uniform, threshold=tau) == 0
  assert oracle.entropy_local(same) == 0
  assert oracle.entropy_global(same, threshold=tau) == tau
  spread = np.eye(4)[[0, 1, 2, 3]]
  two = {"modality": [0, 0, 1, 1], "which": 1}
  np.testing.assert_allclose(oracle.entropy_global(spread, **two), -math.log(2))
  valid = [True, True, True, False]
  assert oracle.entropy_global(spread, valid, **two) == 0
  assert oracle.entropy_local(spread, [False] * 4) == 0


def test_bias_update_and_finite_difference():
  bias = oracle.bias_update([0.0, 1.0, 2.0], [1, 2, 3], 0.001)
  np.testing.assert_allclose(bias, [0.001, 1.0, 1.999])
  x = np.array([[1.0, 2.0], [3.0, -1.0]])
  gradient = oracle.finite_difference(lambda v: np.sum(v**3), x)
  np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-8)
