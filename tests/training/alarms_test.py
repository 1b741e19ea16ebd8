"""Alarms, on planted lines: said once, counted always."""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments.alarms import DEAD_LINES, SKEW, SKEW_LINES, Alarms


def layer(load, name="layer 1"):
  return {"name": name, "load": load, "entropy": 1.0, "dropped": {}}


def test_nothing_is_said_of_a_run_in_order():
  alarms = Alarms()
  for step in range(1, 50):
    assert alarms.metrics(step, {"loss": 3.0, "skipped": 0.0}) == []
    assert alarms.routing(step, [layer([9, 11, 12, 8])]) == []
  assert alarms.counts == {}


def test_an_expert_is_dead_after_so_many_watched_steps_without_a_token():
  alarms = Alarms()
  for step in range(1, DEAD_LINES):
    assert alarms.routing(step, [layer([9, 0, 7, 8])]) == []
  (said,) = alarms.routing(50, [layer([9, 0, 7, 8])])
  assert said.startswith("dead experts: expert 1 of layer 1 had no token in ")
  assert "step 50" in said and alarms.counts == {"dead experts": 1}
  assert alarms.routing(60, [layer([9, 0, 7, 8])]) == []
  assert alarms.counts == {"dead experts": 1}  # it is the same death


def test_an_expert_that_had_a_token_in_between_is_not_dead():
  alarms = Alarms()
  for step in range(1, 4 * DEAD_LINES):
    alive = step % DEAD_LINES == 0
    assert alarms.routing(step, [layer([9, int(alive), 7, 8])]) == []
  assert alarms.counts == {}


def test_each_dead_expert_of_each_layer_is_counted_and_one_of_them_named():
  alarms, said = Alarms(), []
  for step in range(DEAD_LINES):
    layers = [layer([9, 0, 0, 8]), layer([0, 5, 5, 5], "layer 3")]
    said += alarms.routing(step, layers)
  assert len(said) == 1 and alarms.counts == {"dead experts": 3}
  alarms.routing(90, [layer([9, 1, 0, 8])])
  for step in range(DEAD_LINES):  # expert 1 dies again
    assert alarms.routing(100 + step, [layer([9, 0, 0, 8])]) == []
  assert alarms.counts == {"dead experts": 4}


@pytest.mark.parametrize(("busiest", "alarm"), [(1.01, True), (0.99, False)])
def test_a_load_over_the_bound_that_lasts_is_skewed(busiest, alarm):
  mean = 1000
  top = int(SKEW * mean * busiest)
  load = [top, *[(8 * mean - top) // 7] * 7]
  load[1] += 8 * mean - sum(load)
  alarms, said = Alarms(), []
  for step in range(SKEW_LINES):
    assert alarms.counts == {}
    said += alarms.routing(step, [layer(load)])
  assert len(said) == alarm
  assert alarms.counts == ({"load skew": 1} if alarm else {})
  if alarm:
    assert "the busiest expert of layer 1 had 4.0 times the mean load" in said[0]


@pytest.mark.parametrize(
  ("load", "choices", "alarm"),
  [
    ([98, 98, 1, 1, 1, 1], 2, True),  # 3 times is all that there can be
    ([60, 60, 20, 20, 20, 20], 2, False),
    ([99, 34, 34, 33], 2, True),
    ([80, 40, 40, 40], 2, False),
    ([10, 10, 10, 10], 4, False),
    ([95, 1, 1, 1, 1, 1], 1, True),  # over 4 times
    ([65, 7, 7, 7, 7, 7], 1, False),
    ([98, 98, 1, 1, 1, 1], None, False),
  ],
)
def test_a_skew_near_the_most_that_choices_allow_is_one(load, choices, alarm):
  alarms = Alarms()
  for step in range(2 * SKEW_LINES):
    alarms.routing(step, [layer(load) | {"choices": choices}])
  assert alarms.counts == ({"load skew": 1} if alarm else {})


def test_a_layer_without_any_token_is_not_skewed():
  alarms = Alarms()
  for step in range(DEAD_LINES):
    alarms.routing(step, [layer([0, 0])])
  assert alarms.counts == {"dead experts": 2}


def test_every_skipped_step_is_counted_and_the_first_said():
  alarms = Alarms()
  (said,) = alarms.metrics(7, {"loss": float("nan"), "skipped": 1.0})
  assert said.startswith("non-finite loss: step 7 was skipped")
  assert alarms.metrics(8, {"loss": 1.0, "skipped": 0.0}) == []
  assert alarms.metrics(9, {"loss": float("inf"), "skipped": 1.0}) == []
  assert alarms.counts == {"non-finite loss": 2}
