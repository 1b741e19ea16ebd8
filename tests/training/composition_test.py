"""The probe of composition: answers are entries of tables, read one after another."""
# SPDX-License-Identifier: Apache-2.0

import json

import jax
import numpy as np
import pytest

from experiments import composition, problems
from tests import _cases

TASK = problems.Task(functions=3, values=5, rows=4, seq=16)
drawn_from = jax.jit(problems.drawn, static_argnums=2)
asked_of = jax.jit(problems.asked, static_argnums=1)
NONE, EQUALS = 5 + 3, 5 + 3 + 1


def made():
  with _cases.quickly():
    return jax.jit(problems.tables, static_argnums=1)(jax.random.key(1), TASK)


def read(batch):
  """(f or None, g, x, answer, kind, live) of each problem, from the tokens alone."""
  rows = {name: np.asarray(a).reshape(-1, 4) for name, a in batch.items()}
  for n, (f, g, x, equals) in enumerate(rows["inputs"]):
    live = bool(rows["scored"][n, 3])
    assert equals == EQUALS and list(rows["position"][n]) == [0, 1, 2, 3]
    assert not rows["scored"][n, :3].any()
    assert (rows["segment"][n] == (n % 4 + 1 if live else 0)).all()
    kind = int(rows["domain"][n, 3])
    f = None if f == NONE else int(f) - 5
    yield f, int(g) - 5, int(x), int(rows["targets"][n, 3]), kind, live


def test_answers_are_entries_of_tables_and_what_is_held_out_is_never_drawn():
  given = made()
  table = np.asarray(given.answer_FX)
  assert (np.sort(table, axis=1) == np.arange(5)).all()
  assert sorted(given.triple_N.tolist()) == list(range(3 * 3 * 5))
  asked = [p for p in read(asked_of(given, TASK)) if p[-1]]
  drawn = [
    p for n in range(8) for p in read(drawn_from(jax.random.key(n), given, TASK))
  ]
  for f, g, x, answer, _, live in asked + drawn:
    inner = table[g, x]
    assert live and answer == (inner if f is None else table[f, inner])
  kinds = [{p[:3] for p in asked if p[4] == kind} for kind in range(3)]
  assert kinds[0] == {(None, g, x) for g in range(3) for x in range(5)}
  assert len(kinds[1]) == len(kinds[2]) == TASK.left_out == 4
  trained = {p[:3] for p in drawn}
  assert (
    not kinds[2] & trained and kinds[1] <= trained and None in {f for f, *_ in drawn}
  )


def test_right_answers_are_counted_by_kind():
  given = made()
  batch = asked_of(given, TASK)
  targets = np.asarray(batch["targets"])
  logits = np.eye(10, dtype=np.float32)[targets]
  assert problems.right(logits, batch).tolist() == [1, 1, 1]
  wrong = np.roll(logits, 1, axis=-1)
  half = np.where((np.asarray(batch["domain"]) == 2)[..., None], wrong, logits)
  assert problems.right(half, batch).tolist() == [1, 1, 0]


def test_a_probe_is_not_made_twice(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  given = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--layers", "1"]
  given += "--arms sparse --functions 2 --values 3 --seeds 2 --width 8".split()
  given += "--steps 2 --every 1 --rows 1".split()
  with _cases.quickly():
    assert composition.main([*given, "--results", str(tmp_path / "claims")]) == 0
  lines = (tmp_path / composition.FILE).read_text().splitlines()
  assert len(lines) == 2 * 2
  drawn = {(x["seed"], x["step"]) for x in map(json.loads, lines)}
  assert drawn == {(seed, step) for seed in (0, 1) for step in (1, 2)}
  (claim,) = (tmp_path / "claims").glob("*held_out.json")
  arm = json.loads(claim.read_text())["arms"]["sparse"]
  assert set(arm["values"]) == {"0", "1"}
  assert arm["command"] == (
    "python -m experiments.composition --arms sparse --against sparse --layers 1 "
    "--functions 2 --values 3 --width 8 --steps 2 --every 1 --rows 1 "
    "--learning-rate 0.002 --dtype float32 --out runs/composition"
  )
  shown = capsys.readouterr().out
  assert composition.main(given) == 0
  again = capsys.readouterr()
  assert again.out == shown and again.err.count("done before") == 1
  assert (tmp_path / composition.FILE).read_text().splitlines() == lines


def test_more_seeds_than_before_are_trained_once(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  made = []

  def trained(run, task, *, seeds, **_):
    made.append(seeds)
    right = dict.fromkeys(problems.KINDS, 0.5)
    some = range(seeds)
    return [dict(right, seed=n, step=s, parameters=7) for s in (1, 2) for n in some]

  monkeypatch.setattr("experiments.probe.trained", trained)
  given = ["--out", str(tmp_path), "--layers", "1", "--arms", "sparse"]
  for seeds in "1223":
    more = ["--seeds", seeds, "--steps", "2", "--every", "1"]
    assert composition.main([*given, *more]) == 0
  assert made == [1, 2, 3]


def test_speed_is_the_mean_over_evaluations_and_gaps_are_paired():
  def line(arm, seed, step, two, held):
    some = dict(layers=1, arm=arm, seed=seed, step=step, parameters=7)
    return {**some, "one step": 1.0, "two steps": two, "held out": held}

  lines = [line("a", 0, 1, 0.2, 0.0), line("a", 0, 2, 0.6, 0.1)]
  lines += [line("b", 0, 1, 0.4, 0.0), line("b", 0, 2, 0.8, 0.5)]
  found = composition.ends(lines)
  assert found[1, "a"]["speed"] == {0: pytest.approx(0.4)}
  assert found[1, "b"]["held out"] == {0: 0.5}
  _, plain, other = composition.table(lines, against="a")
  assert plain.split() == ["a,", "layers=1", "7", "1.000", "0.600", "0.100", "0.400"]
  assert other.split()[-3:] == ["0.600", "0.200", "0.400"]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--against", "dense"], "--against dense is not among"),
    (["--steps", "3", "--every", "2"], "--steps 3 is no multiple"),
    (["--values", "1"], "values=1"),
    (["--values", "300"], "need 318 tokens of 258"),
    (["--seeds", "0"], "--seeds 0"),
    (["--functions", "1", "--values", "2"], "leaves none of them"),
  ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, said):
  assert composition.main(["--out", str(tmp_path / "out"), *arguments]) == 2
  shown = capsys.readouterr().err
  assert said in shown and shown.count("\n") == 1
  assert not (tmp_path / "out").exists()
