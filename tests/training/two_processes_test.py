"""Two processes on one machine are one job: killed and resumed, equal to one process.

Gloo carries what devices exchange.  One test, as its parts share runs.
"""
# SPDX-License-Identifier: Apache-2.0

import signal
import socket
import time

import chex
import jax
import pytest
from etils import epath

from experiments import hosts, opening, program, remote, settings, spread
from experiments.checkpoint import Checkpoints, digests
from jmoe.parallel import mesh as meshes
from tests.training import main_with_store
from tests.training.processes import Process, lines, steps, summary

# More steps than are made before a signal comes, on however slow a machine.
SETTINGS = ["steps=9000", "save_every=6", "data.readers=2"]
ARGUMENTS = [part for setting in SETTINGS for part in ("--set", setting)]
ARGUMENTS += ["--mesh", "expert=2"]


def pair(workdir, cache, *more, settings=(), module="experiments.main"):
  """Both processes; the second is given more arguments."""
  with socket.socket() as some:
    some.bind(("localhost", 0))
    port = some.getsockname()[1]
  place = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", "2"]
  return [
    Process(
      workdir,
      cache,
      *ARGUMENTS,
      *settings,
      *place,
      "--process",
      str(n),
      *more[: n * 99],
      module=module,
    )  # fmt: skip
    for n in (0, 1)
  ]


def saved(workdir):
  folder = workdir / "checkpoints"
  return folder.exists() and any(p.name.isdigit() for p in folder.iterdir())


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_one(
  job, texts, encoded, cache, tmp_path
):
  workdir = tmp_path / "run"
  first, second = pair(workdir, cache)
  assert first.killed(lambda: steps(workdir) > 6 and saved(workdir))
  second.signalled(signal.SIGKILL, lambda: True)
  before = steps(workdir)
  first, second = pair(workdir, cache)
  # Meanwhile the same in one process, over the same mesh.
  run = settings.with_settings(job.run, SETTINGS)
  over = spread.Spread(meshes.make("expert=2", devices=jax.devices()[:2]))
  made = program.program(
    run,
    byte_lengths=encoded.vocabulary.byte_lengths,
    num_domains=len(texts.domains),
    spread=over,
  )
  step, batches = over.train_step(made), opening.training_batches(run, encoded)
  state, losses = over.init(made), []
  # A signal to one process stops both, after the same step.
  enough = before + 3
  stopped = second.signalled(signal.SIGTERM, lambda: steps(workdir) >= enough)
  for code, output in (stopped, first.ended()):
    assert code == 128 + signal.SIGTERM and "Traceback" not in output, output
  done = steps(workdir)
  assert enough <= done < run.steps
  for _ in range(done):
    state, values, _ = step(state, next(batches))
    losses.append(float(values["loss"]))
  assert [line["step"] for line in lines(workdir)] == list(range(1, done + 1))
  assert [line["loss"] for line in lines(workdir)] == losses
  found = summary(workdir)
  assert found["steps"] == done and found["hardware"]["processes"] == 2
  facts = opening.facts(run, texts, encoded)
  checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", facts)
  following = opening.training_batches(run, encoded)
  restored = checkpoints.restore(over.shapes(jax.eval_shape(made.init)), following)
  checkpoints.close()
  assert digests(restored) == digests(state)
  chex.assert_trees_all_equal(next(following), next(batches))


@pytest.mark.slow
def test_processes_with_other_inputs_end_with_one_line_each(texts, cache, tmp_path):
  del texts  # built, so that no process has to
  start = time.monotonic()
  both = pair(tmp_path / "run", cache, "--set", "seed=1")
  for process in both:
    code, output = process.ended()
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output, output
    assert len(said) == 1 and "--set) of process 1 is " in said[0], output
  assert time.monotonic() - start < hosts.PATIENCE / 2  # none waited for the other
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_two_processes_sent_to_an_object_store_one_reads(
  job, texts, encoded, cache, tmp_path, monkeypatch
):
  monkeypatch.setenv("JMOE_TEST_STORE", str(tmp_path))
  more, module = ["--set", "steps=12"], "tests.training.main_with_store"
  for process in pair("s3://bucket/run", cache, settings=more, module=module):
    code, output = process.ended()
    assert code == 0, output
  there = tmp_path / "bucket" / "run"
  assert steps(there) == 12 and summary(there)["hardware"]["processes"] == 2
  main_with_store.patched(monkeypatch)
  run = settings.with_settings(job.run, [*SETTINGS, "steps=12"])
  facts = opening.facts(run, texts, encoded)
  made = program.program(
    run,
    byte_lengths=encoded.vocabulary.byte_lengths,
    num_domains=len(texts.domains),
  )
  with remote.fetched(epath.Path("s3://bucket/run/checkpoints")) as here:
    assert sorted(path.name for path in here.iterdir()) == ["12", "6"]
    checkpoints = Checkpoints(here, facts)
    # Every tensor is compared with its digest, of which each process gave a part.
    batches = opening.training_batches(run, encoded)
    restored = checkpoints.restore(jax.eval_shape(made.init), batches)
    checkpoints.close()
  assert int(restored.step) == 12
