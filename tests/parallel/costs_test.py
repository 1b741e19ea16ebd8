"""Costs of strategies against sums by hand, and against the compiled layer's bytes."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from jmoe.parallel import costs
from tests.parallel.collectives_test import GOLDEN, D, E, F, T

pytestmark = pytest.mark.contract
MESH = "data=2,expert=4"
# Of the layer whose collectives are written down: two choices, float32, slots of factor
# 1, sixteen tokens on each device.
SIZES = costs.Sizes(T // 8, 2, D, 4, 4)


def both(strategy: str, collective: str) -> int:
  """Bytes of a collective's results where gradients alone are asked for."""
  return GOLDEN[strategy, MESH, "backward"][collective][1]


def test_slots_are_what_the_compiled_layer_exchanges():
  (sent,) = costs.all_to_all(SIZES)
  # Results hold what stays too.
  assert sent.total() * 4 / 3 == both("all_to_all", "all-to-all")


def test_tokens_and_sums_are_what_the_compiled_layer_gathers_and_scatters():
  tokens, sums = costs.all_gather(SIZES)
  choice = 2 * (T // 8) * 4  # an i32 or f32 for each choice of a device's tokens
  # Beside tokens the ids and weights of choices, and weights' gradients on their way.
  assert both("all_gather", "all-gather") == tokens.total() * 4 / 3 + 8 * choice
  # Outputs are no gradients: their sums are in the forward pass alone.
  forward = GOLDEN["all_gather", MESH, "forward"]["reduce-scatter"][1]
  scattered = forward + both("all_gather", "reduce-scatter") - choice
  assert 3 * scattered == sums.total()


def test_matrices_come_once_and_their_gradients_go():
  whole = 3 * E * D * F * 4
  come, go = costs.gathered(whole, whole, 4)
  assert come.total() * 4 / 3 == both("sort", "all-gather")
  assert go.total() / 3 == both("sort", "reduce-scatter")
  assert (
    come.total(again=True) == 2 * come.total() and go.total(again=True) == go.total()
  )


def test_a_token_goes_to_no_more_devices_than_it_has_choices_or_there_are():
  few = SIZES._replace(k=2, devices=64)
  many = SIZES._replace(k=64, devices=2)
  assert 1.9 < few.sent_to < 2 and 1.9 < many.sent_to <= 2
  assert SIZES._replace(distinct=1.5).sent_to == 1.5


def test_between_nodes_go_fewer_bytes_than_there_are_and_slower_ones():
  near, far = costs.hierarchical(SIZES._replace(devices=8, inside=4))
  assert (near.part, far.part) == ("inside", "between")
  assert near.size / far.size == pytest.approx((3 / 4) / (1 / 2))
  seconds = costs.seconds([near], 100.0, {"all_to_all": 0.5}, again=True)
  assert seconds == pytest.approx(5 * near.size / 50)
