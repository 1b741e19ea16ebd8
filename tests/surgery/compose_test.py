"""Extracted models as one again."""
# SPDX-License-Identifier: Apache-2.0

import chex
import numpy as np
import pytest

from jmoe import surgery
from tests.surgery import cases


def parts(model, *kept):
  return [(surgery.cut_model(model, each), each) for each in kept]


@pytest.mark.parametrize("balanced", [False, True])
def test_parts_that_hold_all_experts_are_the_model_they_come_from(balanced):
  model = cases.model(cases.config(cases.BALANCED if balanced else cases.layer()))
  first, second = [[0, 3, 5], [1, 2, 3]], [[1, 2, 4], [0, 3, 4, 5]]
  found = surgery.compose(model.config, parts(model, first, second))
  assert found.kept == [list(range(cases.E))] * 2
  assert found.model.config == model.config
  chex.assert_trees_all_equal(dict(found.model.params), dict(model.params))
  chex.assert_trees_all_equal(dict(found.model.state), dict(model.state))


def test_parts_of_some_experts_are_what_is_extracted_at_once():
  model = cases.model(cases.config())
  first, second = [[5], [1, 2]], [[1, 2], [2]]
  found = surgery.compose(model.config, parts(model, first, second))
  assert found.kept == [[1, 2, 5], [1, 2]]
  expected = surgery.cut_model(model, found.kept)
  assert found.model.config == expected.config
  chex.assert_trees_all_equal(dict(found.model.params), dict(expected.params))


@pytest.mark.parametrize(
  "name, said",
  [
    ("embed.embedding", "part 1 differs from the first in embed.embedding"),
    ("segments.0.0.ff.up.kernel", "block 0 of part 1 differs"),
    ("segments.1.0.moe.shared.up_EDF", "block 1 of part 1 differs"),
    ("segments.1.0.moe.experts.up_EDF", "another experts.up_EDF of expert 3"),
  ],
)
def test_parts_that_were_trained_apart_are_refused(name, said):
  model = cases.model(cases.config())
  one, (other, kept) = parts(model, [[0, 3]] * 2, [[1, 3]] * 2)
  params = dict(other.params)
  params[name] = params[name] + np.float32(1)
  with pytest.raises(ValueError, match=said):
    surgery.compose(model.config, [one, (other._replace(params=params), kept)])


def test_no_parts_and_another_model_are_refused():
  model = cases.model(cases.config())
  with pytest.raises(ValueError, match="parts="):
    surgery.compose(model.config, [])
  with pytest.raises(ValueError, match="of \\[3\\] blocks"):
    surgery.compose(cases.config(repeat=3), parts(model, [[0, 3]] * 2))
