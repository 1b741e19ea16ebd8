"""The command line: bad input in one line, a dry run, a loss that is no number."""
# SPDX-License-Identifier: Apache-2.0

import ast
import importlib.util
import json
import os
import re
import time

import jax
import numpy as np
import pytest

from experiments import main, settings
from experiments.workdir import claim, prepared
from tests.training.processes import Process, lines, summary


def outcome(*arguments) -> int:
  try:
    return main.main([str(a) for a in arguments])
  except SystemExit as stop:
    return stop.code


def old_run(job, folder):
  claim(job.run, folder)


def foreign(job, folder):
  folder.mkdir()
  (folder / "thesis.tex").write_text("mine")


def a_file(job, folder):
  folder.write_text("mine")


def nothing(job, folder):
  pass


@pytest.mark.parametrize(
  ("arguments", "before", "said"),
  [
    (["--config", "micor"], nothing, "unknown config 'micor'; did you mean 'micro'?"),
    (["--conf"], nothing, "--conf"),
    (["--config", "micro", "--set", "optim.clp=1"], nothing, "did you mean 'clip'?"),
    (["--config", "micro", "--set", "steps"], nothing, "write path=value"),
    (["--config", "micro", "--set", "steps=many"], nothing, "is a str"),
    (["--config", "micro", "--set", "steps={[]: 1}"], nothing, "--set steps={[]: 1}"),
    (["--config", "micro", "--set", "steps=0"], nothing, "run.steps=0"),
    (["--config", "micro", "--set", "seed=4294967296"], nothing, "under 2**32"),
    (["--config", "micro", "--set", "data.seed=-1"], nothing, "data.seed=-1"),
    (["--config", "micro", "--set", "name= "], nothing, "name=' '"),
    (["--config", "micro", "--set", "optim.freeze=(3,)"], nothing, "holds 3"),
    (
      ["--config", "micro", "--set", "loss_weights.1.0=load_balance"],
      nothing,
      "loss_weights names 'load_balance' twice",
    ),
    (["--config", "micro", "--set", "loss_weights=(('z', 1.0),)"], nothing, "'z'"),
    (
      ["--config", "micro", "--set", "model.segments.0.0.1.ff.router.k=5"],
      nothing,
      "k=5",
    ),
    (
      ["--config", "micro", "--set", "optim.clip=2", "--set", "steps=13"],
      old_run,
      "optim.clip: 1.0 there, 2.0 here; steps: 12 there, 13 here",
    ),
    (["--config", "micro"], foreign, "holds 'thesis.tex' but no run"),
    (["--config", "micro"], a_file, "is a file; give a folder"),
    (["--config", "micro", "--profile", "8:5"], nothing, "not START:STOP"),
    (["--config", "micro", "--profile", "0:5"], nothing, "not START:STOP"),
    (["--config", "micro", "--profile", "5"], nothing, "not START:STOP"),
    (["--config", "micro", "--profile", "5:13"], nothing, "the run has 12 steps"),
    (["--config", "micro", "--cache", "gs://a/b"], nothing, "not a local folder"),
    (["--config", "micro", "--workdir", "hf://a/b"], nothing, "unknown scheme"),
    (
      ["--config", "micro", "--compare-dense", "--set", "start_from=there"],
      nothing,
      "a dense model cannot start from there",
    ),
    (
      ["--config", "micro", "--set", "start_from=nowhere"],
      nothing,
      "start_from='nowhere': nowhere/checkpoints holds no checkpoint",
    ),
    (
      ["--config", "micro", "--set", "start_from=hf://a/b", "--dry-run"],
      nothing,
      "start_from hf://a/b: unknown scheme",
    ),
  ],
)
def test_bad_input_is_one_line_and_changes_nothing(
  job, tmp_path, capsys, arguments, before, said
):
  folder = tmp_path / "run"
  before(job, folder)
  files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  start, used = time.perf_counter(), time.process_time()
  some = ["--workdir", folder, "--cache", tmp_path / "cache", *arguments]
  assert outcome(*some) == 2
  assert time.process_time() - used < 5  # it is one
  assert time.perf_counter() - start < 60  # nothing was waited for
  shown = capsys.readouterr()
  assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
  assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
  ("missing", "workdir", "said"),
  [
    ("grain", "run", "experiments.main needs grain; run: pip install 'jmoe[data]'"),
    ("tensorboardX", "run", "needs tensorboardX; run: pip install 'jmoe[train]'"),
    ("s3fs", "s3://a/b", "--workdir s3://a/b needs s3fs; run: pip install 'jmoe[s3]'"),
    ("gcsfs", "gs://a/b", "needs gcsfs; run: pip install 'jmoe[gs]'"),
  ],
)
def test_a_missing_package_is_named_with_its_pip_line(
  tmp_path, capsys, monkeypatch, missing, workdir, said
):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == missing else found(name)
  )
  monkeypatch.chdir(tmp_path)
  assert outcome("--config", "micro", "--workdir", workdir) == 2
  shown = capsys.readouterr().err
  assert said in shown and shown.count("\n") == 1
  assert not os.listdir(tmp_path)


def test_the_exit_codes_are_in_the_help(capsys):
  assert outcome("--help") == 0
  shown = capsys.readouterr().out
  for code in ("0 done", "1 the loss", "2 bad input", "130 stopped", "143 by SIGTERM"):
    assert code in " ".join(shown.split()), code


def test_the_dense_run_has_the_same_batches_and_its_own_folder(job, tmp_path):
  (sparse, folder), (dense, below) = prepared(job.run, tmp_path, compare_dense=True)
  assert (dense.data, dense.steps) == (sparse.data, sparse.steps)
  assert below == folder / "dense" and dense.name == "micro-dense"


def test_a_dry_run_prints_what_a_run_would_be_and_writes_nothing(
  job, texts, cache, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # leaves that of the tests alone
  arguments = ("--config", "micro", "--cache", cache, "--dry-run", "--workdir")
  assert outcome(*arguments, tmp_path / "run") == 0
  assert not os.listdir(tmp_path)
  config, _, rest = capsys.readouterr().out.partition("parameters  ")
  # Its lines lead to the same run again: those that are literals, as settings.
  pairs = [line.strip().split(" = ", 1) for line in config.splitlines()[1:]]
  other = settings.with_settings(
    job.run, ["steps=99", "data.corpus=folder:x", "model.segments.0.0.1.ff.router.k=3"]
  )
  given = [f"{path}={value}" for path, value in pairs if literal(value)]
  assert len(given) > 50 and "steps=12" in given
  assert settings.with_settings(other, given) == job.run
  total = sum(x.size for x in jax.tree.leaves(job.shapes))
  assert rest.startswith(f"{total:,} in all")
  size = total / 256  # KiB of float32
  assert f"parameters {size:.1f} KiB, optimizer {2 * size:.1f} KiB, step " in rest
  rows = {line.split()[0]: line for line in rest.splitlines()[5:9]}
  assert tuple(rows) == texts.domains
  for number, row in enumerate(rows.values()):
    for split in (texts.train, texts.held_out):
      sizes = [len(r["text"]) for r in split if r["domain"] == number]
      found = re.search(r"(\d+) of +([\d.]+) KiB", row)
      assert found, row
      assert found.groups() == (str(len(sizes)), f"{sum(sizes) / 1024:.1f}")
      row = row[found.end() :]
  learnt = sum(len(r["text"]) + 1 for r in texts.train)
  assert rest.endswith(
    f"{learnt:,} tokens to learn; the run sees at most 1,536, "
    f"{12 * 4 * 32 / learnt:.2f} epochs\n"
  )


def literal(text: str) -> bool:
  try:
    ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return False
  return True


@pytest.mark.slow
def test_a_loss_that_stays_no_number_ends_the_run_and_its_batches_are_kept(
  job, texts, cache, tmp_path
):
  """And a profile of the steps that were asked for."""
  del texts  # built, so that the process has not to
  workdir = tmp_path / "run"
  wild = ("--set", "optim.learning_rate=1e30", "--set", "optim.warmup_steps=0")
  process = Process(workdir, cache, *wild, "--set", "max_skipped=2", "--profile", "2:3")
  code, output = process.ended()
  assert code == 1, output
  *_, last = output.splitlines()
  first = next(line["step"] for line in lines(workdir) if line["skipped"])
  assert last.startswith(f"error: step {first + 2}: ") and "3 steps in a row" in last
  assert output.count("alarm: non-finite loss: ") == 1 and "Traceback" not in output
  found = summary(workdir)
  assert (found["finished"], found["steps"]) == (False, first + 2)
  assert found["alarms"] == {"non-finite loss": 3} and found["skipped_steps"] == 3
  strict = json.loads(
    (workdir / "metrics.jsonl").read_text().splitlines()[-1],
    parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
  )
  assert strict["loss"] is None or strict["gradient_norm"] is None
  kept = sorted(os.listdir(workdir / "skipped"))
  assert kept == sorted(f"step-{first + n}.npz" for n in range(3))
  batches = job.batches()
  batch = [next(batches) for _ in range(first)][-1]
  with np.load(workdir / "skipped" / f"step-{first}.npz") as arrays:
    key = jax.random.fold_in(jax.random.key(0), first - 1)
    expected = batch | {"key": np.asarray(jax.random.key_data(key))}
    assert set(arrays) == set(expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(arrays[name], value, name)
  (trace,) = (workdir / "profile").rglob("*.xplane.pb")
  assert b"train_step" in trace.read_bytes()
