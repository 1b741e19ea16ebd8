"""`experiments.emoe lm`: a dense run, tuned whole and in groups, to its table."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import shlex
import types

import jax
import numpy as np
import pytest
from etils import epath

from experiments import calibration, checkpoint, evaluate, opening, tokens, workdir
from experiments.emoe import __main__ as command, arms, jobs, lm, run, table, train
from experiments.errors import BadData
from experiments.operations._source import Source
from experiments.program import program
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from tests import _cases


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly():
  with pytest.MonkeyPatch.context() as patch, _cases.quickly():
    patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    yield


FEW = 24


def made_of(run, encoded, num_domains=4):
  lengths = encoded.vocabulary.byte_lengths
  return program(run, byte_lengths=lengths, num_domains=num_domains)


@pytest.fixture(scope="module")
def parent(job, texts, encoded, tmp_path_factory):
  """A folder like that of a dense run, with a checkpoint of its first state."""
  block = BlockConfig(Attention(num_heads=2), Dense(d_ff=12))
  model = ModelConfig(job.run.model.vocab_size, 16, segments=(((block,), 2),))
  run = dataclasses.replace(job.run, name="dense", model=model, loss_weights=())
  made = made_of(run, encoded)
  folder = epath.Path(tmp_path_factory.mktemp("runs") / "dense")
  workdir.claim(run, folder)
  saved = checkpoint.Checkpoints(
    folder / "checkpoints", opening.facts(run, texts, encoded)
  )
  saved.save(made.init(), opening.training_batches(run, encoded))
  saved.close()
  return folder


def bits(records, form="bits", **of):
  """[seeds,domains] of a job."""
  found = [r for r in records if all(r[name] == x for name, x in of.items())]
  return np.array([list(record[form].values()) for record in found])


@pytest.fixture(scope="module")
def tuned(parent, cache, texts, tmp_path_factory):
  """(what `lm` was given, records of its jobs)."""
  out = tmp_path_factory.mktemp("tuned")
  given = ["lm", "--workdir", str(parent), "--out", str(out), "--cache", str(cache)]
  given += ["--domain", texts.domains[0], "--precision", "float32", "--seeds", "0,1"]
  given += ["--rates", "1e-2"]
  given += ["--examples", "16", "--batch", "8", "--epochs", "1", "--few", str(FEW)]
  given += ["--arms", "dense,emoe", "--groups", "4", "--k", "4", "--grid", "4:1"]
  assert command.main(given) == 0
  return given, jobs.records(out / jobs.FILE)


def read(parent, cache, texts, few):
  own = texts.domains[0]
  return lm.given(parent, cache, corpus=None, domain=own, few=few).material


def test_rows_hold_each_byte_once_and_no_text_twice(parent, cache, texts):
  found = read(parent, cache, texts, few=9999)
  (split,), (rows,) = found.splits.values(), found.rows.values()
  sizes = evaluate.domain_sizes(texts.held_out, texts.domains)
  assert list(split.test) == list(texts.domains)
  for name, own in split.test.items():
    np.testing.assert_allclose(found.worth_M[own].sum(), sizes[name] * np.log(2))
  (train,) = split.train.values()
  total = evaluate.domain_sizes(texts.train, texts.domains)[texts.domains[0]]
  both = found.worth_M[train].sum() + found.worth_M[split.choose].sum()
  np.testing.assert_allclose(both, total * np.log(2))
  each = [*map(len, (train, split.choose, *split.test.values()))]
  assert sum(each) == len(rows["inputs"]) and min(each) > 0


def test_before_its_tuning_a_model_has_the_bits_of_its_run(parent, tuned, cache, texts):
  """Those of `eval_step`, which sums by domain, on the same rows."""
  found = read(parent, cache, texts, few=FEW)
  (split,), (rows,) = found.splits.values(), found.rows.values()
  own = {"choose": split.choose, **split.test}
  numbers = np.concatenate(list(own.values()))
  batch = {name: x[numbers] for name, x in rows.items()}
  part = np.repeat(np.arange(len(own)), [len(some) for some in own.values()])
  batch["domain"] = np.broadcast_to(part[:, None], batch["inputs"].shape)
  source = Source(parent, cache)
  made = made_of(source.run, source.encoded, num_domains=len(own))
  nats, sizes, _ = jax.jit(made.eval_step)(source.model.params, {}, batch)
  (before, *_) = bits(tuned[1], "bits_before", arm="dense")
  expected = np.asarray(nats) / np.log(2) / np.asarray(sizes)
  np.testing.assert_allclose(before, expected, rtol=1e-5)


def test_tuning_all_groups_is_tuning_the_dense_model(tuned):
  records = tuned[1]
  dense = bits(records, arm="dense")
  assert dense.shape == (2, 5)
  assert (np.abs(dense - bits(records, "bits_before", arm="dense")) > 1e-2).any()
  for form in ("bits", "bits_as_dense"):
    np.testing.assert_allclose(bits(records, form, k=4), dense, rtol=2e-4)
  again = bits(records, "bits_as_groups", arm="dense")
  np.testing.assert_allclose(again, dense, rtol=1e-5)
  few, merged = (bits(records, form, k=1) for form in ("bits", "bits_as_dense"))
  assert (np.abs(few - dense) > 1e-3).any()
  assert (np.abs(few - merged) > 1e-3).any()


def test_adapters_begin_alike_in_layers_of_one_stack_or_of_several(parent, cache):
  dense = Source(parent, cache).model
  begun = arms.start("emoe", dense, groups=4, k=2, layers=(1,))
  one, two = (
    train.adapters(jax.random.key(3), model.params) for model in (dense, begun.model)
  )
  ones = jax.tree.map(np.ones_like, one)  # as none begins
  changed = train.adapted(dense.params, ones)
  for name in ("query", "key", "value", "out"):
    whole = one[f"segments.0.0.attention.{name}.kernel"]
    for layer in range(2):
      own = two[f"segments.{layer}.0.attention.{name}.kernel"]
      np.testing.assert_array_equal(own["in"][0], whole["in"][layer])
      assert not own["out"].any()
    name = f"segments.0.0.attention.{name}.kernel"
    gap = np.asarray(changed[name]) - dense.params[name]
    np.testing.assert_allclose(gap, train.ALPHA, rtol=1e-5)


def test_what_was_done_is_not_done_again_and_is_shown_and_claimed(
  tuned, texts, tmp_path, capsys
):
  given, records = tuned
  assert command.main(given) == 0
  assert "0 of 3 jobs to do" in capsys.readouterr().err
  out = given[given.index("--out") + 1]
  assert command.main(["table", out, "--results", str(tmp_path)]) == 0
  first, head, *lines = capsys.readouterr().out.splitlines()
  name = texts.domains[0]
  assert first == f"{name}, full tuning: bits per byte, less dense [95 %] (+/-)"
  assert head.split()[4:] == [*texts.domains, "others"]
  labels = [line[:18].strip() for line in lines[:6]]
  both = ["emoe", "emoe to dense"]
  assert labels == ["dense", "dense to groups", "untuned", *both, "emoe"]
  claim = json.loads((tmp_path / f"emoe-{name}-full-others.json").read_text())
  found = claim["arms"]["emoe to dense, 1 of 4"]
  values = bits(records, "bits_as_dense", k=1)[:, 2:].mean(1)
  np.testing.assert_allclose(list(found["values"].values()), values)
  assert claim["unit"] == "bits per byte"
  words = shlex.split(found["command"])[3:]
  assert "--rates" in words and "--tunings" not in words  # which is a default
  assert command.main([*words, *given[1:7]]) == 0  # in the folders of these records
  assert "0 of 3 jobs to do" in capsys.readouterr().err


def test_the_clock_runs_while_model_and_text_are_read(
  tuned, tmp_path, monkeypatch, capsys
):
  """Of what is left: a dense model is cut as the plan says, and so is another one."""
  now, read = [0.0], lm.given

  def slow(*args, **more):
    now[0] += 600
    return read(*args, **more)

  monkeypatch.setattr(lm, "given", slow)
  for module in (command, run):
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(module, "time", clock)
  assert command.main([*tuned[0], "--groups", "2", "--k", "2"]) == 3
  said = capsys.readouterr().err
  assert "2 of 3 jobs to do" in said and "600 s: 2 jobs are left" in said


def test_dense_weights_are_cut_as_those_of_an_arm_were(parent, cache):
  dense = Source(parent, cache).model
  begun = arms.start("bottom", dense, groups=3, k=1, layers=(1,))
  params, state = arms.in_groups(dense.params, begun)
  assert params.keys() == begun.model.params.keys() and len(state) == 1
  for name, array in (params | state).items():
    expected = (dict(begun.model.params) | dict(begun.model.state))[name]
    np.testing.assert_array_equal(array, expected)
  for name, array in arms.joined(params, begun).items():
    np.testing.assert_array_equal(array, dense.params[name])


def test_the_lowest_bits_that_are_numbers_choose_a_rate():
  def record(rate, choose):
    job = dict(task="new", tuning="full", arm="dense", groups=0, k=0)
    plan = {"rates": [1e-4, 1e-3, 1e-2], "seeds": [0]}
    own = {"choose": choose, "new": 1.0, "old": 2.0, "older": 3.0}
    return {**job, "plan": plan, "rate": rate, "seed": 0, "bits": own}

  each = [record(1e-2, np.nan), record(1e-4, 1.2), record(1e-3, 1.1)]
  (row,) = table.rows(each)
  assert row.rate == 1e-3 and table.values(row, "others") == {0: 2.5}


def test_what_does_not_fit_is_said_before_anything_is_trained(
  parent, trained, cache, texts, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(train, "trained", None)
  given = ["lm", "--workdir", str(parent), "--out", str(tmp_path), "--tiny"]
  given += ["--cache", str(cache)]
  own = ["--domain", texts.domains[0]]
  for more, said in (
    ([], "give --domain"),
    (["--domain", "cod"], "did you mean 'code'"),
    ([*own, "--groups", "5"], "num_experts=5 does not divide d_ff=12"),
    ([*own, "--groups", "5", "--arms", "dense"], "num_experts=5 does not divide"),
    ([*own, "--layers", "2"], "blocks_changed=[2]"),
    ([*own, "--workdir", str(trained)], "has sparse layers; give a dense run"),
  ):
    assert command.main([*given, *more]) == 2
    assert said in capsys.readouterr().err
  assert not (tmp_path / jobs.FILE).exists()


def test_a_domain_without_held_out_text_is_named(parent, cache, texts, monkeypatch):
  load = tokens.load

  def partly(*args):
    found = load(*args)
    (others,) = np.nonzero(found.held_out.domain)  # domain 0 is all in training
    return found._replace(held_out=calibration.part(found.held_out, others))

  monkeypatch.setattr(tokens, "load", partly)
  said = f"--corpus .*: {texts.domains[0]} has no held-out .* another --domain"
  with pytest.raises(BadData, match=said):
    read(parent, cache, texts, few=FEW)
