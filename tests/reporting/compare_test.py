"""Arms beside each other, from folders whose gap and factor were put there."""
# SPDX-License-Identifier: Apache-2.0

import json
import re

import pytest

from experiments import compare

from .conftest import DOMAINS, write, write_lines


def printed(capsys, *arguments) -> tuple[int, str, str]:
  try:
    code = compare.main([str(a) for a in arguments])
  except SystemExit as stop:
    code = stop.code
  shown = capsys.readouterr()
  return code, shown.out, shown.err


@pytest.fixture
def two_arms(runs):
  """Three seeds each; the sparse arm needs 2/3 of the dense one's compute."""
  folders = []
  for arm, times, gap in (("dense", 1.0, 0.0), ("sparse", 1.5, -0.1)):
    for seed in range(3):
      folders.append(
        runs(
          f"{arm}-{seed}",
          name=arm,
          seed=seed,
          experts=(4,) if arm == "sparse" else (),
          steps=400,
          bits=lambda step, times=times: 2 + 6 * (times * step) ** -0.5,
          end_bits=2.5 + seed + gap * (1 + 0.1 * (seed - 1)),
        )
      )
  return folders


def test_seeds_are_one_arm_and_differences_are_paired(two_arms, capsys):
  code, out, _ = printed(capsys, *two_arms, "--json")
  assert code == 0
  found = json.loads(out)
  assert found["first"] == "dense" and list(found["arms"]) == ["dense", "sparse"]
  assert found["arms"]["sparse"]["seeds"] == [0, 1, 2]
  assert found["arms"]["dense"]["parameters"] == 123_456
  assert found["arms"]["dense"]["tokens_per_second"]["mean"] == 1001
  against = found["against"]["sparse"]
  for domain in (*DOMAINS, "all"):
    gap = against["bits_per_byte"][domain]
    assert gap["mean"] == pytest.approx(-0.1) and gap["count"] == 3
    # The seeds are 1.0 apart, and the interval is not: it is of the pairs.
    assert -0.13 < gap["low"] < -0.11 and -0.09 < gap["high"] < -0.07
  assert against["pooled_deviations"] == pytest.approx(0.1, rel=0.01)
  factor = against["compute_to_equal_loss"]
  assert factor["mean"] == pytest.approx(1.5, rel=2e-3) and factor["count"] == 3


def test_a_skipped_step_has_no_loss_to_reach(runs, capsys):
  folders = [runs("a", name="a"), runs("b", name="b")]
  lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").open()]
  lines[-1] |= {"skipped": 1.0, "bits_per_byte": 1e6}
  write_lines(folders[1] / "metrics.jsonl", lines)
  _, out, _ = printed(capsys, *folders, "--json")
  factor = json.loads(out)["against"]["b"]["compute_to_equal_loss"]["mean"]
  assert factor == pytest.approx(1.0, abs=0.1)


def test_the_table_shows_the_same_to_people(two_arms, capsys):
  code, out, _ = printed(capsys, *two_arms)
  assert code == 0
  lines = out.splitlines()
  assert lines[0].split() == ["dense", "sparse"]
  assert "sparse against dense, over seeds 0, 1, 2" in lines
  (gap,) = [line for line in lines if line.startswith("  bits/byte, all")]
  assert "-0.1000 [-0." in gap
  (factor,) = [line for line in lines if "compute to equal loss" in line]
  assert " 1.50 [1.50, 1.50] x fewer FLOPs" in factor
  assert max(map(len, lines)) <= 100


def test_arms_of_one_name_are_called_after_what_differs(runs, capsys):
  folders = [
    runs(f"clip-{clip}", settings=[f"optim.clip={clip}"]) for clip in ("1.0", "2.0")
  ]
  _, out, _ = printed(capsys, *folders, "--json")
  found = json.loads(out)
  assert list(found["arms"]) == ["sparse clip=1.0", "sparse clip=2.0"]
  against = found["against"]["sparse clip=2.0"]
  assert against["config"] == ["optim.clip: 1.0 there, 2.0 here"]
  assert against["bits_per_byte"]["all"] == {
    "mean": 0.0, "low": None, "high": None, "deviation": None, "count": 1
  }  # fmt: skip


def test_a_dense_run_inside_a_sparse_one_is_compared_with_it(runs, capsys):
  folder = runs("both")
  runs("both/dense", name="sparse-dense", experts=(), end_bits=3.5)
  _, out, _ = printed(capsys, folder, "--json")
  gap = json.loads(out)["against"]["sparse-dense"]["bits_per_byte"]["all"]["mean"]
  assert gap == pytest.approx(1.0)
  # It may be given as well, as `runs/*` would.
  code, again, _ = printed(capsys, folder, folder / "dense", "--json")
  assert (code, again) == (0, out)


def test_runs_of_different_seeds_are_not_called_paired(runs, capsys):
  folders = [runs("a", name="a", seed=0), runs("b", name="b", seed=1, end_bits=2.75)]
  code, out, _ = printed(capsys, *folders)
  assert code == 0 and "b against a, of different seeds" in out
  assert "bits/byte, all +0.2500\n" in re.sub(" +", " ", out)


def test_runs_of_different_texts_are_not_said_to_compare(runs, capsys):
  folders = [runs(n, name=n, seed=s) for n, s in (("a", 0), ("a1", 1), ("b", 0))]
  said = "  their texts are different: bits per byte do not compare\n"
  assert said not in printed(capsys, *folders)[1]
  summary = json.loads((folders[2] / "summary.json").read_text())
  write(folders[2] / "summary.json", summary | {"data": {"digest": "another"}})
  _, out, _ = printed(capsys, *folders)
  assert out.count(said) == 1 and f"b against a, over seeds 0\n{said}" in out
  found = json.loads(printed(capsys, *folders, "--json")[1])
  same = {name: arm["same_text"] for name, arm in found["against"].items()}
  assert same == {"a1": True, "b": False}


def test_seeds_of_one_arm_on_different_texts_are_named(runs, capsys):
  folders = [runs("0", seed=0), runs("1", seed=1)]
  summary = json.loads((folders[1] / "summary.json").read_text())
  write(folders[1] / "summary.json", summary | {"data": {"digest": "another"}})
  assert "\nsparse: its seeds have different texts;" in printed(capsys, *folders)[1]


def test_a_run_still_going_on_shows_what_it_has(runs, capsys):
  whole, part = runs("whole", name="whole"), runs("part", name="part", finished=False)
  with (part / "metrics.jsonl").open("a") as file:
    file.write('{"step": 41, "lo')
  code, out, _ = printed(capsys, whole, part, "--json")
  assert code == 0
  found = json.loads(out)
  part = found["arms"]["part"]
  assert part["finished"] is False and part["steps"] == 40
  assert part["bits_per_byte"] == {} and part["tokens_per_second"]["mean"] == 1000
  # Its FLOPs are those of its config; the other one's were made up by the fixture.
  assert found["against"]["part"]["compute_to_equal_loss"]["count"] == 1
  code, out, _ = printed(capsys, whole, tmp := whole.parent / "part")
  assert code == 0 and "0 (at step 40)" in out and tmp.exists()


def test_bad_input_is_one_line(runs, tmp_path, capsys):
  run = runs("run")
  again = runs("again")
  (tmp_path / "file").write_text("")
  (tmp_path / "empty").mkdir()
  broken = runs("broken")
  (broken / "summary.json").write_text("{")
  middle = runs("middle")
  (middle / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  other = runs("other")
  write(other / "evaluation.json", {"bits_per_byte": {}})
  uneven = runs("uneven")
  lines = (uneven / "routing.jsonl").read_text()
  (uneven / "routing.jsonl").write_text(lines.replace('"load": [', '"load": [1, ', 1))
  for arguments, said in (
    ([], "required: DIR"),
    ([tmp_path / "none"], "none: no such folder"),
    ([tmp_path / "file"], "file is a file"),
    ([tmp_path / "empty"], "empty holds no run: config.json is missing"),
    ([run, again], "are the same config and seed"),
    ([broken], "summary.json is not JSON"),
    ([middle], "metrics.jsonl, line 2, is not a JSON object with a step"),
    ([other], "evaluation.json is not an evaluation"),
    ([uneven], "routing.jsonl has a line of other layers"),
  ):
    code, out, err = printed(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
    assert said in err
