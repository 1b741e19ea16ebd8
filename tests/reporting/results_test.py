"""Claims that grow seed by seed, and the page that is built from them."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import threading

import numpy as np
import pytest

from experiments import results
from experiments.errors import BadData

FACTS = {
  "claim": "Sparse beats dense",
  "unit": "bits per byte",
  "command": "python -m experiments.series --config small",
  "config": {"model": {"d_model": 8}, "steps": 9},
  "versions": {"jax": "0.10"},
  "hardware": {"device": "H200", "devices": 1},
  "against": "dense",
}
DENSE, SPARSE = (2.0, 2.2, 2.1), (1.8, 1.9, 2.0)


def append(path, **changed):
  return results.append(path, **FACTS | {"arm": "dense", "seed": 0} | changed)


@pytest.fixture
def series(tmp_path):
  path = tmp_path / "loss.json"
  for arm, values in (("dense", DENSE), ("sparse", SPARSE)):
    for seed, value in enumerate(values):
      append(path, arm=arm, seed=seed, value=value)
  return path


def test_a_series_in_several_sittings_is_that_of_one(series, tmp_path):
  again = tmp_path / "again.json"
  order = [("sparse", 2), ("dense", 1), ("dense", 0), ("sparse", 0), ("dense", 2)]
  for arm, seed in (*order, ("sparse", 1), ("sparse", 1)):  # one is given twice
    append(again, arm=arm, seed=seed, value=(DENSE, SPARSE)[arm == "sparse"][seed])
  one, other = results.read(series), results.read(again)
  assert other["difference"]["sparse"]["mean"] == pytest.approx(-0.2)
  assert results._close(other["interval"], one["interval"])
  for arm in ("dense", "sparse"):
    assert other["arms"][arm]["values"] == one["arms"][arm]["values"]
    assert set(one["arms"][arm]["dates"]) == {"0", "1", "2"}


def test_intervals_are_of_means_and_of_pairs(series):
  found = results.read(series)
  dense = found["interval"]["dense"]
  half = 4.3027 * np.std(DENSE, ddof=1) / np.sqrt(3)
  assert dense["mean"] == pytest.approx(2.1) and dense["count"] == 3
  assert dense["high"] - dense["mean"] == pytest.approx(half, rel=1e-4)
  gap = found["difference"]["sparse"]
  half = 4.3027 * np.std(np.subtract(SPARSE, DENSE), ddof=1) / np.sqrt(3)
  assert gap["mean"] - gap["low"] == pytest.approx(half, rel=1e-4)
  assert gap["pooled_deviations"] == pytest.approx(0.2 / 0.1)
  assert "dense" not in found["difference"]


def test_ratios_have_geometric_means(tmp_path):
  path = tmp_path / "factor.json"
  for arm, seed, value in (("dense", 0, 1.0), ("sparse", 0, 2.0), ("sparse", 1, 8.0)):
    found = append(path, arm=arm, seed=seed, value=value, scale="log")
  assert found["interval"]["sparse"]["mean"] == pytest.approx(4)
  assert found["difference"]["sparse"]["mean"] == pytest.approx(2)  # of seed 0 alone
  with pytest.raises(BadData, match="value=0.0; give a finite number over 0"):
    append(path, arm="sparse", seed=2, value=0.0, scale="log")


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"command": "python other"}, r"arm 'dense': command: .* there"),
    ({"config": {"model": {"d_model": 16}, "steps": 9}}, r"config.model.d_model: 8 th"),
    ({"hardware": {"device": "cpu", "devices": 1}}, 'hardware.device: "H200" there'),
    ({"versions": {"jax": "0.11"}}, r'versions.jax: "0.10" there, "0.11" here'),
    ({"claim": "Dense beats sparse"}, "claim: "),
    ({"unit": "nats"}, "unit: "),
    ({"against": None}, "against: "),
    ({"scale": "log"}, "scale: "),
    ({"seed": 2, "value": 3.0}, r"seed 2 has the value 2.1 already, not 3.0"),
    ({"value": float("nan")}, "value=nan; give a finite number"),
    ({"value": True}, "value=True; give a finite number"),
    ({"scale": "cubic"}, "scale='cubic'; give 'linear' or 'log'"),
  ],
)
def test_what_does_not_belong_together_is_refused(series, changed, said):
  before = series.read_bytes()
  with pytest.raises(BadData, match=said) as refused:
    append(series, **{"seed": 3, "value": 2.0} | changed)
  assert "\n" not in str(refused.value) and str(series) in str(refused.value)
  assert series.read_bytes() == before


def test_another_arm_may_have_another_config(series):
  found = append(series, arm="wide", config={"steps": 9}, value=1.0)
  assert found["difference"]["wide"]["count"] == 1


def test_a_process_that_dies_while_writing_leaves_the_old_file(series, monkeypatch):
  before = series.read_bytes()
  monkeypatch.setattr(
    os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
  )
  with pytest.raises(KeyboardInterrupt):
    append(series, seed=3, value=2.0)
  assert series.read_bytes() == before
  monkeypatch.undo()
  assert append(series, seed=3, value=2.0)["interval"]["dense"]["count"] == 4


def test_processes_that_append_at_once_lose_nothing(tmp_path):
  path = tmp_path / "loss.json"

  def some(first):
    for seed in range(first, first + 5):
      append(path, seed=seed, value=float(seed))

  threads = [threading.Thread(target=some, args=(5 * n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  values = results.read(path)["arms"]["dense"]["values"]
  assert values == {str(seed): float(seed) for seed in values} and len(values) == 20


def test_a_value_changed_by_hand_is_noticed(series):
  found = json.loads(series.read_text())
  found["arms"]["sparse"]["values"]["0"] = 1.0
  series.write_text(json.dumps(found))
  with pytest.raises(BadData, match="its intervals are not those of its values"):
    results.read(series)


def outcome(capsys, *arguments) -> tuple[int, str, str]:
  code = results.main([str(a) for a in arguments])
  shown = capsys.readouterr()
  return code, shown.out, shown.err


def test_the_page_says_what_the_files_say_and_when_it_does_not(series, capsys):
  folder = series.parent
  append(folder / "lone.json", arm="a|b", seed=7, value=1e7, claim="Big", against=None)
  code, _, err = outcome(capsys, "--folder", folder, "--check")
  assert code == 1 and "RESULTS.md is stale; run: python -m" in err
  assert not (folder / "RESULTS.md").exists()
  assert outcome(capsys, "--folder", folder)[0] == 0
  assert outcome(capsys, "--folder", folder, "--check")[0] == 0
  text = (folder / "RESULTS.md").read_text()
  for part in (
    "## Sparse beats dense\n",
    "In bits per byte; [loss.json](loss.json).",
    "| sparse | 0, 1, 2 | 1.8, 1.9, 2 | 1.9 [1.652, 2.148] |",
    "| sparse minus dense | 3 | -0.2 [",
    "] | 2.0 |",
    "- hardware: device H200, devices 1",  # once, for both arms
    "- versions: jax 0.10",
    "- command: `python -m experiments.series --config small`",
    "| a\\|b | 7 | 1.000e+07 | 1.000e+07 (one value) |",
  ):
    assert part in text, part
  append(series, seed=3, value=2.0)
  assert outcome(capsys, "--folder", folder, "--check")[0] == 1


def test_a_file_that_is_no_result_is_one_line(series, capsys):
  bad = series.parent / "bad.json"
  for text, said in (
    ("{", "bad.json is not JSON"),
    ("[]", "bad.json is not a JSON object"),
    ("{}", "bad.json is not a claim: it has no 'claim'"),
    ('{"rows": [{}]}', "bad.json has rows, but not those of"),
  ):
    bad.write_text(text)
    code, _, err = outcome(capsys, "--folder", series.parent)
    assert code == 2 and said in err and err.count("\n") == 1
  code, _, err = outcome(capsys, "--folder", series.parent / "none")
  assert code == 2 and "no such folder" in err


def test_the_projects_own_page_is_not_stale(capsys):
  code, _, err = outcome(capsys, "--check")
  assert code == 0, err
  text = (results.FOLDER / results.PAGE).read_text()
  assert "Sparse layer against a dense FFN of equal FLOPs: 16 experts" in text
