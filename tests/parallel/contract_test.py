"""Router x strategy x mesh x axis types: the same numbers as on one device.

Output, all gradients, kept set, losses, load, drops, state.  A covering array of pairs
runs always; the whole product with `-m full`.
"""
# SPDX-License-Identifier: Apache-2.0

import itertools

import jax
import numpy as np
import pytest

from jmoe.parallel import mesh as meshes
from tests._matrix import covering
from tests.parallel import cases
from tests.tolerance import assert_close

CELLS = covering(cases.FACTORS, cases.fits)
# Other versions of jax run every tenth: what differs there is not the combination.
ROWS = [
  pytest.param(row, marks=[] if n % 10 else [pytest.mark.contract])
  for n, row in enumerate(CELLS)
]


def named(row) -> str:
  return "-".join(str(value) for value in row.values())


def check(row) -> None:
  config = cases.config_of(row)
  explicit = row["kind"] == "explicit"
  mesh = meshes.make(row["mesh"], axes=cases.AXES, explicit=explicit)
  found = cases.results(config, row["extra"], mesh=mesh)
  expected = cases.one_device(row)
  kept = found.pop("kept")
  jax.tree.map(assert_close, found, {k: v for k, v in expected.items() if k != "kept"})
  if "context" not in row["mesh"] and row["router"] != "expert_choice":
    for a, b in zip(kept[:2], expected["kept"][:2], strict=True):
      np.testing.assert_array_equal(a, b)
  assert np.abs(found["y"]).max() > 0.01


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_every_pair_equals_one_device(row):
  check(row)


def test_cells_are_few():
  assert len(CELLS) <= 120


@pytest.mark.full
@pytest.mark.parametrize("strategy", cases.STRATEGIES)
@pytest.mark.parametrize("mesh", cases.MESHES)
def test_the_whole_product_equals_one_device(mesh, strategy):
  names = ("router", "kind", "extra")
  for values in itertools.product(*(cases.FACTORS[n] for n in names)):
    row = dict(zip(names, values, strict=True), mesh=mesh, strategy=strategy)
    if cases.fits(row):
      check(row)
