"""`experiments.modularity`: every checkpoint once, against random groups."""
# SPDX-License-Identifier: Apache-2.0

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import modularity
from experiments.operations._source import Source
from jmoe import surgery
from tests import _cases
from tests.tolerance import assert_close


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  with _cases.quickly():
    yield


def test_steps_are_measured_once_and_feed_forwards_see_what_they_did(
  trained, cache, tmp_path, capsys
):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  given = [str(folder), "--groups", "8", "--rows", "2", "--cache", str(cache)]
  assert modularity.main(given) == 0
  said = capsys.readouterr()
  lines = [json.loads(x) for x in (folder / modularity.FILE).open()]
  assert [line["step"] for line in lines] == [0]  # of the checkpoint
  records = lines[0]["records"]
  assert {(r["layer"], r["k"], r["partition"]) for r in records} == {
    (0, 2, "keys"),
    (0, 2, "random"),
  }
  assert all(0 < r["share"] < r["best"] <= 1.5 for r in records)
  assert "step 0" in said.err
  assert modularity.main(given) == 0
  again = capsys.readouterr()
  assert again.out == said.out and not again.err
  # A line that a kill cut off, after one of a record by itself, is measured again.
  whole = (folder / modularity.FILE).read_text()
  alone = json.dumps({n: lines[0][n] for n in ("step", "settings")} | records[0]) + "\n"
  (folder / modularity.FILE).write_text(alone + whole[: len(whole) // 2])
  assert modularity.main(given) == 0
  assert capsys.readouterr().out == said.out
  assert (folder / modularity.FILE).read_text() == alone + whole
  assert modularity.main([*given, "--results", str(tmp_path / "claims")]) == 0
  (made,) = (tmp_path / "claims").iterdir()
  arms = json.loads(made.read_text())["arms"]
  keys = [r["share"] for r in records if r["partition"] == "keys"]
  (arm,) = (name for name in arms if name.endswith("step 0, keys"))
  assert list(arms[arm]["values"].values()) == keys and len(arms) == 2
  assert modularity.main([str(folder), *given, "--results", str(tmp_path)]) == 2
  assert "--results with 2 runs" in capsys.readouterr().err
  assert modularity.main([*given, "--groups", "5"]) == 2
  assert "--groups 5 does not divide d_ff=32" in capsys.readouterr().err


def test_inputs_of_feed_forwards_are_those_of_the_model(trained, cache):
  source = Source(trained, cache)
  sample = surgery.Sample(*(x[:1] for x in source.sample()))
  given = surgery.fed(source.model, sample)
  valid = np.asarray(sample.segment[0]) > 0
  shape = (valid.sum(), source.run.model.d_model)
  assert [x.shape for x in given] == [shape, shape]
  # The sparse block's, as `walk` shows them to scores.
  _, (total,) = surgery.walk(source.model, [sample], sums)
  assert_close(np.float32(total), given[1].sum(0))


def sums(seen):
  return jnp.where(seen.valid_T[:, None], seen.x_TD, 0).sum(0)
