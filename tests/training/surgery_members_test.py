"""Each operation on a checkpoint: its arguments, what it makes, and what trains on."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import types

import numpy as np
import pytest
from etils import epath

from experiments import main, operations, recorded, state as states, surgery
from experiments.errors import BadData
from experiments.operations._source import Source
from experiments.settings import with_settings
from jmoe import surgery as pure
from tests import _cases


@pytest.fixture(scope="module")
def source(trained, cache):
  return Source(trained, cache)


def operated(name, source, *own):
  """What an operation makes, from its own arguments."""
  operation = operations.load(name)
  given = ["--workdir", str(source.folder), "--out", "unused"]
  parsed = surgery._parser(name, operation).parse_args([*given, *own])
  parsed.cache = source._cache
  with _cases.quickly():
    outcome = operation.operate(source, parsed)
  # What its model needs is there, and the new run is one.
  made = outcome.model
  _, shapes = states.blueprint(made.config)
  wanted = {name: x.shape for name, x in shapes.items()}
  assert {name: x.shape for name, x in made.params.items()} == wanted
  with_settings(source.run, [s for s in outcome.settings if "loss_weights" not in s])
  json.dumps([outcome.kept, dict(outcome.notes)])
  return outcome


def layer(model):
  (one,) = pure.layers(model)
  return one


def test_what_has_grown_trains_its_new_experts_alone(
  trained, cache, tmp_path, monkeypatch
):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the process keeps its own
  out = tmp_path / "grown"
  given = ["--workdir", str(trained), "--out", str(out), "--cache", str(cache)]
  own = ["--new", "1", "--domain", "code", "--documents", "2", "--bias", "-1"]
  assert surgery.main(["grow", *given, *own, "--set", "steps=3"]) == 0
  assert json.loads((out / "receipt.json").read_text())["kept"] == [[0, 1, 2, 3]]
  before = recorded.read(epath.Path(out))[2].params
  assert main.main(["--workdir", str(out), "--cache", str(cache)]) == 0
  after = recorded.read(epath.Path(out))[2].params
  for name, old in before.items():
    same = np.asarray(old) == np.asarray(after[name])
    if ".experts." in name:
      assert same[:, :4].all() and not same[:, 4:].all(), name
    else:
      assert same.all() == (".moe.gate." not in name), name


def test_pruned_by_what_experts_do(source):
  own = ["--keep", "3", "--domain", "code", "--documents", "2"]
  for score in ("reap", "frequency", "random"):
    made = operated("prune", source, *own, "--score", score)
    assert layer(made.model).config.num_experts == 3 == len(made.kept[0])
    assert len(made.notes["scores"][0]) == 4
    worst = set(range(4)) - set(made.kept[0])
    assert np.argmin(made.notes["scores"][0]) in worst


def test_dense_again_upcycled_and_expanded(source):
  made = operated("to_dense", source)
  assert not pure.layers(made.model)
  assert layer(operated("expand", source, "--times", "2").model).config.k == 4
  dense = Source.__new__(Source)
  dense.__dict__.update(source.__dict__, model=made.model)
  for name, *own in (
    ("to_dense",),
    ("expand", "--times", "2"),
    ("grow", "--new", "1"),
    ("prune", "--keep", "2", "--score", "random"),
    ("flex", "--without", "1"),
  ):
    with pytest.raises(BadData, match="has no sparse layer"):
      operated(name, dense, *own)
  up = operated("upcycle", dense, "--experts", "3", "--blocks", "1")
  assert layer(up.model).config.num_experts == 3
  groups = operated("cluster", dense, "--experts", "4", "--k", "2", "--blocks", "0")
  assert sorted(groups.kept[0]) == list(range(32)) and not groups.settings
  dense.run = dataclasses.replace(source.run, loss_weights=())
  own = ["--experts", "4", "--k", "2", "--blocks", "0", "--gate", "linear"]
  learned = operated("cluster", dense, *own)
  run = surgery._run("", dense.run, learned, [])
  assert run.loss_weights == (("load_balance", 0.01),)
  begun = operated("flex", dense, "--domain", "code", "--public-domain", "prose",
                   "--documents", "2")  # fmt: skip
  assert len(pure.layers(begun.model)) == 2
  assert begun.settings[0].startswith("optim.freeze=('embedding'")


def test_merged_with_another_run(source):
  other = ["--with", str(source.folder)]
  both = operated("merge", source, *other, "--how", "concatenate")
  assert layer(both.model).config.num_experts == 8
  assert both.kept[0][str(source.folder)]
  mean = operated("merge", source, *other, "--how", "average")
  for name, x in source.model.params.items():
    np.testing.assert_array_equal(mean.model.params[name], x)
  less = Source.__new__(Source)
  less.__dict__.update(source.__dict__, model=both.model)
  made = operated("flex", less, "--without", "7")
  assert made.kept == [[0, 1, 2, 3, 4, 5, 6]]


def test_what_a_run_froze_by_number_stays_frozen_in_the_new_run(source):
  freeze = ("norm", "experts:0,3")
  optim = dataclasses.replace(source.run.optim, freeze=freeze)
  old = dataclasses.replace(source.run, optim=optim)

  def new(outcome, *given):
    return surgery._run("made", old, outcome, given).optim.freeze

  pruned = operated("prune", source, "--keep", "3", "--score", "random")
  left = {str(n) for n, e in enumerate(pruned.kept[0]) if e in (0, 3)}
  assert set(new(pruned)[1].removeprefix("experts:").split(",")) == left
  wide = operated("expand", source, "--times", "2")
  assert new(wide) == ("norm", "experts:0,1,6,7")
  assert new(operated("grow", source, "--new", "1"))[-1] == "experts:0,1,2,3"
  merged = ["--with", str(source.folder), "--how"]
  assert new(operated("merge", source, *merged, "average")) == freeze
  both = operated("merge", source, *merged, "concatenate")
  with pytest.raises(ValueError, match="'experts:0,3'.*--set optim.freeze="):
    new(both)
  assert new(both, "optim.freeze=('norm',)") == ("norm",)


def test_small_domains_give_the_documents_they_have():
  train = types.SimpleNamespace(domain=np.array([0, 0, 0, 1]))  # none of the third
  some = types.SimpleNamespace(
    encoded=types.SimpleNamespace(train=train),
    texts=types.SimpleNamespace(domains=("large", "small", "none")),
  )
  others = operations.load("grow")._others
  for domain, expected in (("small", {"large": 2}), ("large", {"small": 1})):
    given = types.SimpleNamespace(domain=domain, documents=2)
    assert others(some, given) == expected


@pytest.mark.parametrize(
  ("name", "own", "said"),
  [
    ("flex", [], "to begin, or --without"),
    ("flex", ["--without", "1", "--domain", "code"], "to begin, or --without"),
    ("merge", ["--with", "no", "--how", "average"], "--with no: there is no such"),
    (
      "merge",
      ["--with", "no", "--how", "mix", "--rest", "first"],
      "--rest first: --how",
    ),
    ("upcycle", ["--experts", "4"], "numbers of dense blocks|d_ff"),
    ("prune", ["--keep", "9", "--score", "random"], "keep=9"),
    ("grow", ["--new", "1", "--domain", "cod"], "did you mean 'code'"),
  ],
)
def test_bad_input_is_named(source, name, own, said):
  with pytest.raises((ValueError, BadData), match=said):
    if name == "upcycle" and "--blocks" not in own:
      own = [*own, "--blocks", "1"]
    operated(name, source, *own)
