"""The benchmark over several devices: it runs, compares and writes, on host devices."""
# SPDX-License-Identifier: Apache-2.0

import json
import threading
import types

import jax
import numpy as np
import pytest

from experiments.benchmarks import shapes
from experiments.benchmarks.mesh import __main__ as mesh, build, layer, links


def test_balanced_routing_gives_every_expert_as_many_distinct_tokens():
  shape = shapes.Shape(8, 8, 8, 2, 16)
  expert_TK, weight_TK = shapes.balanced(shape)
  assert expert_TK.shape == (16, 2)
  assert (np.bincount(expert_TK.reshape(-1)) == 4).all()
  assert (np.bincount(expert_TK[:4].reshape(-1)) == 1).all()  # of each device too
  np.testing.assert_allclose(weight_TK.sum(1), 1, rtol=1e-6)


def test_a_dry_run_times_compares_and_writes_what_it_was_asked_for(tmp_path, capsys):
  out = tmp_path / "found.json"
  words = (
    "--dry --gpus 2 --only-all --rounds 1 --routings skewed --overlaps 1 --factor 2"
  )
  names = "all_to_all,hierarchical,einsum"
  code = mesh.main([*words.split(), "--strategies", names, "--out", str(out)])
  assert code == 0, capsys.readouterr().err
  found = json.loads(out.read_text())
  said = f"python -m experiments.benchmarks.mesh {words} --strategies {names}"
  assert found["command"] == said
  (group,) = found["groups"]
  assert group["gpus"] == 2 and "--liger-site" in group["missing"]["liger-cute-kernels"]
  entries = {row["name"]: row for row in group["rows"]}
  # Of two devices no two nodes can be made.
  slots = [f"{name}, capacity 2" for name in ("all_to_all", "einsum")]
  assert list(entries) == [build.ALONE, build.ALL, *slots]
  one, over = entries[build.ALONE], entries["all_to_all, capacity 2"]
  # Of the mean of both GPUs' times, by themselves and at once.
  times = [float(np.median(row["step_ms"])) for row in (one, over)]
  np.testing.assert_allclose(over["share_of_one"], times[0] / times[1])
  assert one["share_of_one"] == pytest.approx(1.0)
  assert [len(each) for each in one["each_gpus_ms"]] == [2, 2]  # the first warms up
  np.testing.assert_allclose(one["step_ms"], np.mean(one["each_gpus_ms"][1:], axis=1))
  for row in (over, entries[slots[1]]):
    assert row["matrix_error"] < 1e-2 and row["dropped"] == 0
  collectives = {entry["collective"] for entry in found["links"]}
  assert {"ppermute", "ragged_all_to_all", "psum_scatter"} <= collectives
  assert all(entry["gb_s"] > 0 for entry in found["links"])


def test_gpus_work_at_once_where_each_is_timed_by_itself_and_none_is_left_out():
  both = threading.Barrier(2, timeout=30)

  def row(name, ms, gb):
    def timed(kind, budget):
      both.wait()  # in turn they would wait for ever
      return ms

    return build.rows.Row(name, timed, {"gb": gb})

  over = build.rows.Row("over", lambda kind, budget: 1.0, {})
  second = row(f"{build.ALL}, number 1", 4.0, 7.0)
  merged = build.at_once([row(build.ALL, 2.0, 5.0), over, second])
  assert [one.name for one in merged] == [build.ALL, "over"]
  assert merged[0].timed("step", 0.1) == 3.0 and merged[0].figures["gb"] == 7.0
  missing = build.rows.Missing(f"{build.ALL}, number 1", "no memory")
  (found,) = build.at_once([row(build.ALL, 2.0, 5.0), missing])
  assert (found.name, found.why) == (build.ALL, "no memory")


def test_a_row_runs_before_it_is_timed_if_it_is_asked_to(monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(build.time, "monotonic", lambda: float(next(clock)))
  calls = []
  monkeypatch.setattr(build.rows, "span", lambda call, wait, budget: len(calls))
  given = types.SimpleNamespace(arguments=lambda *a: (), routed=lambda kind: ())
  job = types.SimpleNamespace(name="x", given=given)
  monkeypatch.setattr(build, "_too_large", lambda program: None)
  program = lambda: calls.append(1)  # noqa: E731
  made = program, {}, lambda *a: {}
  ran = [build.row(job, made, "", lead=lead).timed("step", 0.1) for lead in (0, 3.5)]
  assert ran == [1, 1 + 1 + 2 * 3]  # once when it is compared, then pairs


def test_collectives_send_equal_bytes():
  for call in links.calls(2.0**20, 4):
    if "skewed" not in call.name:
      assert call.leaves == pytest.approx(2.0**20, rel=0.02), call.name


def test_shares_are_of_equal_work():
  shape = layer.SHAPES["tiny"]
  rows = {
    name: build.rows.Row(name, lambda kind, budget: 0.0, {})
    for name in ("x", build.ALL)
  }
  for name, ms in (("x", 2.0), (build.ALL, 4.0)):
    rows[name].ms["step"] = [ms]
  alone = {build.ALONE: 1.5, build.ALL: 4.0}
  found = build.summed_up(rows["x"], shape, 4, alone, 1e12)
  assert found["share_of_one"] == 0.75  # in twice the time: half the rate
  assert found["share_of_one_with_all"] == 0.5
  all_here = build.summed_up(rows[build.ALL], shape, 4, alone, 1e12)
  assert all_here["share_of_one"] == 1.5 and all_here["share_of_one_with_all"] == 1.0


@pytest.mark.parametrize(
  "words, said",
  [
    ("--gpus 3", "a power of two"),
    ("--gpus 16", f"{len(jax.devices())} devices are here"),
    ("--shape qwen4", "--shape qwen4"),
    ("--strategies all", "use some of all_to_all"),
  ],
)
def test_bad_arguments_are_refused_in_one_line(words, said, capsys):
  with pytest.raises(SystemExit) as ended:
    mesh.main(["--dry", *words.split()])
  assert ended.value.code == 2
  assert said in capsys.readouterr().err
