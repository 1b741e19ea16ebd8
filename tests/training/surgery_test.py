"""`experiments.surgery`: a new run of a changed model, whole or not there at all."""
# SPDX-License-Identifier: Apache-2.0

import json
import pathlib

import numpy as np
import pytest
from etils import epath

from experiments import checkpoint, main, recorded, surgery
from experiments.errors import BadCheckpoint
from experiments.operations._source import Source
from jmoe import surgery as operations
from tests import _cases


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the process keeps its own
  with _cases.quickly():
    yield


def files(folder):
  found = pathlib.Path(folder).rglob("*")
  return {p: p.read_bytes() for p in found if p.is_file()}


def command(trained, cache, out, *more):
  given = ["--workdir", str(trained), "--out", str(out), "--cache", str(cache)]
  return surgery.main(["extract", *given, *more])


def test_an_extracted_model_trains_and_generates_by_itself(
  trained, cache, tmp_path, capsys
):
  before, out = files(trained), tmp_path / "small"
  own = ["--domain", "code", "--keep", "2", "--documents", "3"]
  assert command(trained, cache, out, *own, "--set", "steps=3") == 0
  assert files(trained) == before
  said = capsys.readouterr().out
  assert "extract: " in said and f"written to {out}" in said
  run, _, saved = recorded.read(epath.Path(out))
  receipt = json.loads((out / "receipt.json").read_text())
  (kept,) = receipt["kept"]
  source = Source(trained, cache)
  expected = operations.cut_model(source.model, [kept])
  assert len(kept) == 2 and run.model == expected.config and run.steps == 3
  for name, array in expected.params.items():
    np.testing.assert_array_equal(saved.params[name], array, name)
  total = [sum(x.size for x in m.params.values()) for m in (source.model, expected)]
  assert receipt["parameters"]["total"] == total
  assert receipt["moved"]["largest"] > 0 and receipt["settings"]["domain"] == "code"
  assert main.main(["--workdir", str(out), "--cache", str(cache)]) == 0
  assert json.loads((out / "summary.json").read_text())["finished"]
  assert "sample of micro-extract:\ndef " in capsys.readouterr().out


def test_all_experts_move_no_output_and_a_failure_leaves_nothing(
  trained, cache, tmp_path, monkeypatch, capsys
):
  out = tmp_path / "same"
  own = ["--domain", "code", "--keep", "4", "--score", "random"]
  assert command(trained, cache, out, *own) == 0
  receipt = json.loads((out / "receipt.json").read_text())
  assert receipt["moved"]["largest"] == receipt["moved"]["kl"] == 0

  (tmp_path / "parts").mkdir()
  both, given = (
    tmp_path / "parts" / "both",
    ["--workdir", str(out), "--other", str(out)],
  )
  assert (
    surgery.main(["compose", *given, "--out", str(both), "--cache", str(cache)]) == 0
  )
  _, _, saved = recorded.read(epath.Path(both))
  for name, array in Source(trained, cache).model.params.items():
    np.testing.assert_array_equal(saved.params[name], array, name)

  def full(*_, **__):
    raise BadCheckpoint("no room.")

  def stopped(*_, **__):
    raise KeyboardInterrupt

  for failure, code in ((full, 2), (stopped, 130)):
    monkeypatch.setattr(checkpoint.Checkpoints, "save", failure)
    assert command(trained, cache, tmp_path / "other", *own) == code
  assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "same"]
  given[1] = str(trained)
  assert surgery.main(["compose", *given, "--out", str(tmp_path / "no")]) == 2
  assert "is no receipt of an extraction" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("own", "said"),
  [
    (["--domain", "cod", "--keep", "2"], "did you mean 'code'"),
    (["--domain", "code", "--keep", "2,2", "--documents", "3"], "holds 2 numbers"),
    (["--domain", "code", "--keep", "2", "--documents", "99999"], "'code' has"),
    (
      ["--domain", "code", "--keep", "2", "--score", "random", "--set", "stps=3"],
      "'steps'",
    ),
    (["--domain", "code", "--keep", "0"], "is not a number of experts"),
    (["--keep", "2"], "--domain"),
    (["--domain", "code", "--keep", "2", "--seed", "-1"], "whole number >= 0"),
    (["--domain", "code", "--keep", "2", "--out", "s3://some/run"], "is not local"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(
  trained, cache, tmp_path, capsys, own, said
):
  try:
    code = command(trained, cache, tmp_path / "out", *own)
  except SystemExit as end:  # argparse's own
    code = end.code
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert code == 2 and said in error and error.startswith("error: ")
  assert not list(tmp_path.iterdir())


def test_a_target_that_is_there_and_an_unknown_operation_are_refused(
  trained, cache, tmp_path, capsys
):
  assert command(trained, cache, tmp_path, "--domain", "code", "--keep", "2") == 2
  assert "is there already" in capsys.readouterr().err
  within = trained / "checkpoints" / "small"
  assert command(trained, cache, within, "--domain", "code", "--keep", "2") == 2
  assert "is inside of --workdir" in capsys.readouterr().err and not within.exists()
  assert surgery.main(["extrct"]) == 2
  assert "did you mean 'extract'" in capsys.readouterr().err
  assert surgery.main(["--help"]) == 0
  assert "extract" in capsys.readouterr().out
