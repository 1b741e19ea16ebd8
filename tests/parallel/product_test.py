"""The runner of the whole product goes on where it stopped, and past what ends it."""
# SPDX-License-Identifier: Apache-2.0

import json
import sys
import time

import jax
import pytest

from tests.parallel.product import Product

ROWS = [{"cell": name} for name in ("good", "ends", "wrong", "last")]
STAND_IN = f"""#!{sys.executable}
import json, os, sys
for row in json.load(sys.stdin):
  if row["cell"] == "ends":
    os._exit(9)
  outcome = "failed" if row["cell"] == "wrong" else "passed"
  print("some library says something")
  print(json.dumps(dict(row, outcome=outcome, seconds=0.1, jax={jax.__version__!r})))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """A worker that checks nothing."""
  path = tmp_path / "python"
  path.write_text(STAND_IN)
  path.chmod(0o755)
  monkeypatch.setattr("tests.parallel.product.sys.executable", str(path))


def outcomes(product):
  return {name: record["outcome"] for name, record in product.records.items()}


def test_a_cell_that_ends_its_process_failed_and_the_others_are_checked(
  stand_in, tmp_path
):
  product = Product(tmp_path / "out", 60)
  product.run(ROWS)
  expected = dict(good="passed", ends="failed", wrong="failed", last="passed")
  assert outcomes(product) == expected
  again = Product(tmp_path / "out", 60)
  assert outcomes(again) == expected
  assert [row["cell"] for row in again.left(ROWS)] == ["ends", "wrong"]


def test_what_was_cut_off_or_is_of_another_jax_is_checked_again(tmp_path):
  record = dict(cell="good", outcome="passed", seconds=0.1, jax="0.0.1")
  cut = json.dumps(dict(record, jax=jax.__version__))[:-9]
  (tmp_path / "cells.jsonl").write_text(json.dumps(record) + "\n" + cut)
  product = Product(tmp_path, 60)
  assert product.left(ROWS) == ROWS
  product.add(dict(record, jax=jax.__version__))
  assert Product(tmp_path, 60).left(ROWS) == ROWS[1:]


def test_nothing_begins_after_the_limit(stand_in, tmp_path):
  product = Product(tmp_path / "out", 0.0)
  time.sleep(0.01)
  product.run(ROWS)
  assert not product.records
