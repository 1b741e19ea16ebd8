"""Router x strategy x mesh x axis types: the same numbers as on one device.

Output, all gradients, kept set, losses, load, drops, state.  A covering array of pairs
runs always; the whole product with `-m full`, or by `tests.parallel.product`.
"""
# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from tests._matrix import covering
from tests.parallel import cases, product

CELLS = covering(cases.FACTORS, cases.fits)
# Other versions of jax run every tenth: what differs there is not the combination.
# Those compared with the same results are neighbours, so that one process has them.
ROWS = [
  pytest.param(row, marks=[] if n % 10 else [pytest.mark.contract])
  for n, row in sorted(enumerate(CELLS), key=lambda one: product.shared(one[1]))
]


@pytest.mark.parametrize("row", ROWS, ids=product.name)
def test_every_pair_equals_one_device(row):
  cases.check(row)


def test_cells_are_few():
  assert len(CELLS) <= 120


@pytest.mark.parametrize("strategy, extra", [
  ("all_gather", "random"), ("deduplicated, slots", "plain"), ("sort", "padding"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_a_remedy(strategy, extra):
  row = dict(router="expert_choice", strategy=strategy, extra=extra)
  row |= dict(mesh="expert=8", kind="auto")
  assert not cases.fits(row)
  cases.check_refused(row)


@pytest.mark.full
@pytest.mark.parametrize("batch", product.batches(), ids=lambda b: product.name(b[0]))
def test_the_whole_product_equals_one_device_or_is_refused(batch):
  for row in batch:
    cases.check(row) if cases.fits(row) else cases.check_refused(row)


def test_the_product_leaves_nothing_out_and_says_nothing_twice():
  names = [product.name(row) for batch in product.batches() for row in batch]
  twins = {product.name(row) for row in product.every_row() if cases.twin(row)}
  assert len(names) == len(set(names)) and not twins & set(names)
  assert len(names) + len(twins) == math.prod(map(len, cases.FACTORS.values()))
