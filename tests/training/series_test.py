"""Arms change one thing; a series keeps what its runs did, and does not do it again."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from experiments import arms, checkpoint, claims, configs, loop, results, series
from experiments.config import sparse_layers
from jmoe.analysis import cost

RUN = configs.load("micro")


def flops(run):
  return cost.flops_per_token(run.model, seq=run.data.seq)


@pytest.mark.parametrize(
  "name", ["dense", "experts=1", "experts=2", "experts=8", "finer=2", "finer=4"]
)
def test_arms_have_the_active_flops_of_the_run(name):
  gate = 2 * RUN.model.d_model * 16  # of the most experts; the rest is equal
  assert abs(flops(arms.arm(RUN, name)) - flops(RUN)) <= gate


def test_an_arm_of_experts_keeps_the_active_width():
  for number, k in ((1, 1), (2, 2), (8, 2)):
    (ff,) = sparse_layers(arms.arm(RUN, f"experts={number}").model)
    assert (ff.num_experts, ff.k, ff.experts.get("d_ff")) == (number, k, 32 // k)


def test_arms_of_messages_and_what_they_are_compared_with():
  rounds = arms.arm(RUN, "dag=2")
  count, plain = (cost.parameters(r.model).total for r in (rounds, RUN))
  equal = arms.arm(RUN, "shared=2")
  norms = 2 * RUN.model.d_model  # of two rounds; a shared expert has none
  assert cost.parameters(equal.model).total == count - norms > plain
  alike = arms.arm(RUN, "shared=2-flops")
  one = 2 * 3 * RUN.model.d_model  # of a width of one more
  assert abs(flops(alike) - flops(rounds)) <= one / 2
  assert flops(equal) < flops(alike)
  edges = {
    text: sparse_layers(arms.arm(RUN, f"dag={text}").model)[0].aggregate
    for text in ("1", "2-silu", "2-sigmoid", "2-ungated")
  }
  assert edges["1"].get("num_rounds") == 1
  assert edges["2-silu"] == sparse_layers(rounds.model)[0].aggregate
  assert edges["2-sigmoid"].get("activation") is jax.nn.sigmoid
  assert edges["2-ungated"].get("gated") is False


def test_arms_of_balance_change_the_loss_and_the_bias_alone():
  none, loss, bias = (arms.arm(RUN, f"balance={x}") for x in ("none", "loss", "bias"))
  assert dict(none.loss_weights) == dict(bias.loss_weights) == {"router_z": 0.001}
  assert loss.loss_weights == RUN.loss_weights
  assert [bool(sparse_layers(x.model)[0].balance) for x in (none, loss, bias)] == [
    False,
    False,
    True,
  ]


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("sprase", "did you mean 'sparse'"),
    ("experts", "give the number of experts"),
    ("experts=0", "give the number of experts"),
    ("dense=3", "takes no value"),
    ("finer=3", "do not split into 3"),
    ("dag", "give the number of rounds"),
    ("dag=2-relu", "perhaps one of silu, sigmoid, ungated"),
    ("shared=0", "give the number of rounds"),
    ("balance=lost", "give none, loss, bias or sequence"),
    ("steps=0", "give a share of the run's 12 steps"),
    ("steps=half", "give a share of the run's 12 steps"),
  ],
)
def test_a_bad_arm_is_named(text, said):
  with pytest.raises(ValueError, match=said) as caught:
    arms.arm(RUN, text)
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def done(texts, cache, tmp_path_factory):
  """A series of two arms and two seeds: its folder, that of claims, its arguments."""
  del texts  # built
  folder = tmp_path_factory.mktemp("series")
  arguments = ["--config", "micro", "--arms", "sparse,dense", "--seeds", "0,1"]
  arguments += ["--out", str(folder / "runs"), "--results", str(folder / "results")]
  arguments += ["--cache", str(cache), "--set", "steps=12", "--set", "watch_every=4"]
  arguments += ["--ahead", "2"]
  assert series.main(arguments) == 0
  return folder, arguments


def test_each_seed_leaves_the_folder_of_a_run(done):
  seeds = sorted((done[0] / "runs" / "sparse").iterdir())
  assert [path.name for path in seeds] == ["seed-0", "seed-1"]
  lines = [json.loads(x) for x in (seeds[0] / "metrics.jsonl").open()]
  assert [line["step"] for line in lines] == list(range(1, 13))
  watched = [json.loads(x)["step"] for x in (seeds[0] / "routing.jsonl").open()]
  assert watched == [1, 4, 8, 12]
  drawn = {
    json.loads((seed / "config.json").read_text())["data"]["seed"] for seed in seeds
  }
  assert drawn == {0, 1}


def test_claims_hold_the_values_of_the_runs(done):
  claim = results.read(done[0] / "results" / "micro-bits_per_byte.json")
  assert claim["against"] == "dense" and set(claim["arms"]) == {"sparse", "dense"}
  for seed in (0, 1):
    summary = done[0] / "runs" / "sparse" / f"seed-{seed}" / "summary.json"
    expected = json.loads(summary.read_text())["bits_per_byte"]["all"]
    assert claim["arms"]["sparse"]["values"][str(seed)] == expected
  gaps = [
    claim["arms"]["sparse"]["values"][s] - claim["arms"]["dense"]["values"][s]
    for s in ("0", "1")
  ]
  assert claim["difference"]["sparse"]["mean"] == pytest.approx(np.mean(gaps))
  memory = results.read(done[0] / "results" / "micro-memory_gib.json")
  assert list(memory["arms"]["sparse"]["values"]) == ["0"]  # one program, one value


def test_finished_arms_are_not_trained_again(done, capsys):
  files = {p: p.stat().st_mtime_ns for p in (done[0] / "runs").rglob("*")}
  assert series.main(done[1]) == 0
  assert capsys.readouterr().err.count("finished before") == 2
  assert {p: p.stat().st_mtime_ns for p in (done[0] / "runs").rglob("*")} == files


def ends(folder):
  """Digests of the parameters of a seed, in its last checkpoint."""
  saved = checkpoint.read(epath.Path(folder) / "checkpoints")
  return checkpoint.digests(saved.params)


def test_a_stopped_arm_goes_on_and_ends_as_if_it_never_was(done, tmp_path, monkeypatch):
  """A signal at step 5; in a copy one seed loses its newest checkpoint as well.

  Its program is compiled when it is needed, that of the other series before.
  """
  place = done[1].index("--out")
  out = tmp_path / "runs"
  arguments = [*done[1][: place + 1], str(out), *done[1][place + 4 :], "--ahead", "0"]
  arguments[arguments.index("--arms") + 1] = "sparse"
  report = loop.Report.__call__

  def reported(self, step, *rest):
    report(self, step, *rest)
    if step == 5 and self._folder.name == "seed-1":  # a second one would not wait
      os.kill(os.getpid(), signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Report, "__call__", reported)
    assert series.main(arguments) == 130
  saved = sorted(p.name for p in (out / "sparse" / "seed-0" / "checkpoints").iterdir())
  assert saved == ["3", "6"]
  uneven = tmp_path / "uneven"
  shutil.copytree(out, uneven)
  assert series.main(arguments) == 0
  for seed in ("seed-0", "seed-1"):
    assert ends(out / "sparse" / seed) == ends(done[0] / "runs" / "sparse" / seed)
  # Two programs now, which round differently.
  shutil.rmtree(uneven / "sparse" / "seed-1" / "checkpoints" / "6")
  arguments[arguments.index("--out") + 1] = str(uneven)
  assert series.main(arguments) == 0
  for seed in ("seed-0", "seed-1"):
    one, other = (
      json.loads((folder / "sparse" / seed / "summary.json").read_text())
      for folder in (out, uneven)
    )
    assert other["steps"] == 12
    assert other["bits_per_byte"]["all"] == pytest.approx(
      one["bits_per_byte"]["all"], rel=1e-2
    )
  lines = (uneven / "sparse" / "seed-1" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_a_program_may_hold_fewer_seeds_and_more_may_come_later(
  done, tmp_path, monkeypatch
):
  place = done[1].index("--out")
  out = tmp_path / "runs"
  arguments = [*done[1][: place + 1], str(out), *done[1][place + 4 :]]
  arguments[arguments.index("--arms") + 1] = "dense"
  arguments[arguments.index("--seeds") + 1] = "1"
  assert series.main(arguments) == 0
  first = (out / "dense" / "seed-1" / "summary.json").read_text()
  arguments[arguments.index("--seeds") + 1] = "0,1"
  assert series.main([*arguments, "--together", "1"]) == 0
  assert (out / "dense" / "seed-1" / "summary.json").read_text() == first
  for seed in ("seed-0", "seed-1"):
    alone, beside = (
      json.loads((folder / "dense" / seed / "summary.json").read_text())
      for folder in (out, done[0] / "runs")
    )
    assert (alone["seeds_at_once"], beside["seeds_at_once"]) == (1, 2)
    assert alone["bits_per_byte"]["all"] == pytest.approx(
      beside["bits_per_byte"]["all"], rel=1e-3
    )
  # Killed between its last step and its evaluation, it is evaluated alone.
  seed = out / "dense" / "seed-1"
  for name in ("evaluation.json", "summary.json"):
    (seed / name).unlink()
  monkeypatch.setattr(
    "experiments.seeds.jitted", lambda _: pytest.fail("compiled again")
  )
  assert series.main([*arguments, "--ahead", "0"]) == 0
  again = json.loads((seed / "summary.json").read_text())["bits_per_byte"]
  assert again == json.loads(first)["bits_per_byte"]


def test_a_series_may_keep_no_checkpoints(done, tmp_path):
  place = done[1].index("--out")
  arguments = [*done[1][: place + 1], str(tmp_path / "runs"), *done[1][place + 4 :]]
  arguments[arguments.index("--arms") + 1] = "dense"
  assert series.main([*arguments, "--no-checkpoints"]) == 0
  seed = tmp_path / "runs" / "dense" / "seed-0"
  assert (seed / "evaluation.json").exists()
  assert not list((seed / "checkpoints").iterdir())


@pytest.mark.parametrize(
  ("summary", "said"),
  [
    ("{}", "is not the summary of a run"),
    ("[]", "is not the summary of a run"),
    ('{"finished": true, "data": {"digest": "other"}}', "trained on another text"),
  ],
)
def test_a_finished_arm_that_cannot_be_used_is_named(
  done, tmp_path, capsys, summary, said
):
  shutil.copytree(done[0] / "runs", tmp_path / "runs")
  path = tmp_path / "runs" / "dense" / "seed-0" / "summary.json"
  path.write_text(summary)
  place = done[1].index("--out")
  arguments = [*done[1][: place + 1], str(tmp_path / "runs"), *done[1][place + 4 :]]
  assert series.main(arguments) == 2
  shown = capsys.readouterr().err.splitlines()[-1]
  assert said in shown and "dense/seed-0" in shown


def test_another_model_cannot_start_from_a_run(done, tmp_path, capsys):
  start = done[0] / "runs" / "sparse" / "seed-0"
  arguments = ["--config", "micro", "--arms", "sparse,dense", "--seeds", "0"]
  arguments += ["--out", str(tmp_path / "out"), "--set", f"start_from={start}"]
  assert series.main(arguments) == 2
  assert "--arms dense: another model cannot start from" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_each_seed_of_an_arm_may_start_from_its_own_of_another_series(
  done, tmp_path, capsys
):
  arguments = ["--config", "micro", "--arms", "dense", "--seeds", "0,1"]
  arguments += ["--cache", done[1][done[1].index("--cache") + 1]]
  arguments += ["--out", str(tmp_path / "out"), "--set", "steps=1"]
  arguments += ["--set", "optim.learning_rate=0.0", "--set", "optim.warmup_steps=0"]
  assert series.main([*arguments, "--start-from", str(tmp_path / "none")]) == 2
  assert "none/dense/seed-0/checkpoints holds no checkpoint" in capsys.readouterr().err
  assert series.main([*arguments, "--start-from", f"{done[0] / 'runs'}/"]) == 0
  for seed in ("seed-0", "seed-1"):
    start = ends(done[0] / "runs" / "dense" / seed)
    assert ends(tmp_path / "out" / "dense" / seed) == start
  twice = ["--set", "start_from=x", "--start-from", "y"]
  assert series.main([*arguments, *twice]) == 2
  assert "give one of them" in capsys.readouterr().err


def test_the_command_of_an_arm_measures_all_that_is_said_of_it():
  arguments = argparse.Namespace(
    config="micro",
    arms="sparse,dense,steps=0.5",
    set=["steps=9"],
    name="x",
    together=0,
    start_from=None,
  )
  assert "--arms sparse,steps=0.5,dense --against" in series._command(
    arguments, "dense", "sparse"
  )
  assert "--arms dense --against dense" in series._command(arguments, "dense", "dense")


def test_planned_compute_is_read_between_runs_of_two_lengths(tmp_path):
  def arm(name, *ends):
    folders = []
    for seed, (bits, flops) in enumerate(ends):
      folder = tmp_path / name / str(seed)
      folder.mkdir(parents=True)
      body = {"bits_per_byte": {"all": bits}, "flops": {"trained": flops}}
      (folder / "summary.json").write_text(json.dumps(body))
      folders.append(folder)
    seeds = [dataclasses.replace(RUN, seed=n) for n in range(len(ends))]
    return series.Arm(name, seeds, folders)

  dense = arm("dense", (1.5, 100.0), (9.0, 100.0))
  found = claims._planned(
    [
      arm("sparse", (1.4, 100.0), (1.4, 100.0)),
      arm("steps=0.25", (1.6, 25.0), (1.6, 25)),
      dense,
    ],
    dense,
  )
  # Half way in the loss is half way in the logarithm; the other seed is not enclosed.
  assert found == {"sparse": {0: pytest.approx(2.0)}}
  assert claims._planned([arm("other", (1.4, 1.0)), dense], dense) == {}


def test_compute_to_equal_loss_counts_skipped_steps_as_unknown(tmp_path):
  (tmp_path / "summary.json").write_text(
    json.dumps({"flops": {"trained": 30.0}, "steps": 3})
  )
  lines = [{"step": n, "bits_per_byte": 4.0 - n, "skipped": n == 2} for n in (1, 2, 3)]
  curve = claims._curve(lines, tmp_path)
  assert curve.flops.tolist() == [10.0, 20.0, 30.0]
  np.testing.assert_array_equal(curve.bits_per_byte, [3.0, np.nan, 1.0])


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--arms", "sparse,dense", "--against", "dance"], "--against dance is not among"),
    (["--arms", "sprase"], "unknown arm 'sprase'"),
    (["--arms", "sparse", "--set", "steps=0"], "run.steps=0"),
    (["--arms", "sparse", "--seeds", "a"], "--seeds a"),
    (["--arms", "sparse", "--seeds", "1,1"], "1 is given twice"),
    (["--arms", "sparse", "--together", "-1"], "--together -1"),
    (["--arms", "sparse", "--ahead", "-1"], "--ahead -1"),
  ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
  start = ["--config", "micro", "--out", str(tmp_path / "out")]
  assert series.main([*start, *arguments]) == 2
  shown = capsys.readouterr().err
  assert said in shown and shown.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_bad_command_line_is_one_line_too(capsys):
  with pytest.raises(SystemExit) as stopped:
    series.main(["--config", "micor", "--arms", "sparse", "--out", "x"])
  shown = capsys.readouterr().err
  assert stopped.value.code == 2 and shown.count("\n") == 1 and "micor" in shown
