"""Pools in training, and the table of what a few experts are worth, at `micro` size."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from experiments import (
  arms,
  checkpoint,
  configs,
  emo,
  extraction,
  opening,
  pools,
  program,
  settings,
  workdir,
)
from experiments.config import sparse_layers
from experiments.operations._source import Source
from jmoe import presets, surgery
from jmoe.config import BlockConfig, ModelConfig
from tests import _cases
from tests.training import routes_test

RUN = configs.load("emo")


def micro(job):
  """The run of EMO at the size of `micro`."""
  ff = presets.emo.layer(d_model=16, d_ff=8, num_experts=4, k=1, max_documents=8)
  gathered = ff.losses[0].replace(accumulate=2)
  ff = dataclasses.replace(ff, losses=(gathered, *ff.losses[1:]))
  (dense, sparse), _ = job.run.model.segments[0]
  block = BlockConfig(sparse.attention, ff)
  model = ModelConfig(258, 16, segments=(((dense, block), 1),), remat=False)
  weights = tuple(presets.emo.LOSS_WEIGHTS.items())
  optim = dataclasses.replace(job.run.optim, accumulate=2)
  return dataclasses.replace(
    job.run, name="emo", model=model, loss_weights=weights, optim=optim
  )


@pytest.fixture(scope="module")
def trained(job, texts, encoded, tmp_path_factory):
  """The folder of a run of two steps."""
  run = micro(job)
  lengths = encoded.vocabulary.byte_lengths
  made = program.program(run, byte_lengths=lengths, num_domains=4)
  batches, step = opening.training_batches(run, encoded), jax.jit(made.train_step)
  with _cases.quickly():
    state = made.init()
  for n in (1, 0):  # batches of the update so far
    with _cases.quickly():
      state, said, _ = step(state, next(batches))
    assert np.isfinite(float(said["loss"])) and float(said["dropped"]) == 0
    assert int(state.balance["segments.0.1.moe.state.batches"][0]) == n
    assert bool(state.balance["segments.0.1.moe.state.counted"].any()) == bool(n)
    assert set(presets.emo.LOSS_WEIGHTS) <= set(said)
  folder = epath.Path(tmp_path_factory.mktemp("runs") / "emo")
  workdir.claim(run, folder)
  facts = opening.facts(run, texts, encoded)
  saved = checkpoint.Checkpoints(folder / "checkpoints", facts)
  saved.save(state, batches)
  saved.close()
  return folder


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with _cases.quickly():
    yield


def test_the_arms_change_the_pool_or_the_scope_of_balance_alone():
  def parts(name):
    run = arms.arm(RUN, name)
    (ff,) = sparse_layers(run.model)
    return ff, dict(run.loss_weights)

  ff, weights = parts("sparse")
  none, same = parts("pool=none")
  assert none == dataclasses.replace(ff, restrict=()) and same == weights
  fixed, same = parts("pool=8")
  (pool,) = fixed.restrict
  assert (pool.get("least"), pool.get("most")) == (8, 8) and same == weights
  assert pool.get("max_documents") == 64
  (pool,) = parts("pool=8+")[0].restrict
  assert (pool.get("least"), pool.get("most")) == (8, None)
  rows, changed = parts("balance=sequence")
  assert rows.restrict == ff.restrict
  assert changed == {"load_balance_sequence": 0.1, "router_z": 0.001}
  assert parts("balance=none")[1] == {"router_z": 0.001}
  with pytest.raises(ValueError, match="no document_pool"):
    arms.arm(configs.load("micro"), "pool=none")
  for wrong in ("pool=few", "pool=+", "pool"):
    with pytest.raises(ValueError, match="a number of experts"):
      arms.arm(RUN, wrong)
  loss = RUN.model.segments[0][0][0].ff.losses[0]
  assert loss.get("accumulate") == 1
  path = "model.segments.0.0.0.ff.losses.0.accumulate"
  with pytest.raises(ValueError, match="make them equal"):
    settings.with_settings(RUN, [f"{path}=4"])
  both = settings.with_settings(RUN, [f"{path}=4", "optim.accumulate=4"])
  assert sparse_layers(both.model)[0].losses[0].get("accumulate") == 4


def test_the_table_goes_on_where_it_was_stopped(trained, cache, capsys, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  given = [str(trained), "--cache", str(cache), "--domains", "code,prose"]
  given += ["--draws", "1", "--keep", "1,0.25"]
  calls = []
  own = extraction.Extraction._one

  def one(self, case):
    calls.append(case)
    return own(self, case)

  monkeypatch.setattr(extraction.Extraction, "_one", one)
  assert emo.main([*given, "--documents", "1"]) == 0
  assert len(calls) == 2 * (1 + 2)
  assert emo.main([*given, "--documents", "1,2", "--against", "emo"]) == 0
  assert len(calls) == 2 * (1 + 3)
  lines = capsys.readouterr().out.splitlines()
  assert lines[-3].split()[:2] == ["emo", "1"] and lines[-1].split()[1] == "random"
  assert lines[-3].split()[-1] == "1.00"
  assert emo.main([*given, "--documents", "2", "--json"]) == 0
  assert len(calls) == 2 * (1 + 3)
  (record,) = json.loads(capsys.readouterr().out)
  # A part of the held-out text is another measurement, kept beside those of all.
  part = [*given, "--documents", "1", "--domains", "code", "--keep", "1", "--json"]
  assert emo.main([*part, "--most", "1"]) == 0
  (less,) = json.loads(capsys.readouterr().out)
  assert len(calls) == 2 * (1 + 3) + 1
  assert emo.main(part) == 0
  (same,) = json.loads(capsys.readouterr().out)
  assert len(calls) == 2 * (1 + 3) + 1
  assert less["cases"][0]["bits"] != same["cases"][0]["bits"]
  bits = {(c["domain"], c["share"], c["documents"]): c["bits"] for c in record["cases"]}
  # What a line says is what a pass over all held-out text says of the cut model.
  kept = [json.loads(line) for line in (trained / extraction.FILE).open()]
  (line,) = [x for x in kept if (x["domain"], x["documents"]) == ("code", 2)]
  source = Source(trained, cache)
  small = surgery.cut_model(source.model, line["kept"])
  step = extraction.Extraction(source)._eval_step(small.config)
  number, nats, size = source.texts.domains.index("code"), 0.0, 0
  for batch in opening.held_out_batches(source.run, source.encoded):
    some, counts, _ = step(dict(small.params), dict(small.state), batch)
    nats, size = nats + float(some[number]), size + int(counts[number])
  assert bits["code", 0.25, 2] == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_pools_in_evaluation_are_measured_once(trained, cache, monkeypatch, capsys):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  given = [str(trained), "--cache", str(cache), "--sizes", "1"]
  assert pools.main(given) == 0
  lines = [json.loads(line) for line in (trained / pools.FILE).open()]
  assert [line["pool"] for line in lines] == [None, 1]
  bits = [line["bits"]["all"] for line in lines]
  assert np.isfinite(bits).all() and bits[0] != bits[1]
  assert f"{bits[1]:.4f}" == capsys.readouterr().out.split()[-1]
  model = Source(trained, cache).model
  (ff,) = surgery.layer_configs(pools.with_pools(model, 1).config)
  assert ff.restrict[0].get("evaluation") == 1 and ff.rescore
  assert surgery.layer_configs(model.config)[0].restrict[0].get("evaluation") is None

  def measured(*_):
    raise AssertionError("measured twice")

  monkeypatch.setattr(pools, "evaluated", measured)
  assert pools.main(given) == 0
  with monkeypatch.context() as changed:
    changed.setattr(Source, "__init__", routes_test.dense(Source.__init__))
    assert pools.main(given) == 2
  assert "has no sparse layer; give a run with one" in capsys.readouterr().err
  with pytest.raises(ValueError, match="evaluation=9"):
    pools.with_pools(model, 9)
  plain = surgery.on_layers(
    model,
    lambda _, layer: layer._replace(
      config=dataclasses.replace(layer.config, restrict=(), rescore=False)
    ),
  )
  (ff,) = surgery.layer_configs(pools.with_pools(plain, 2).config)
  assert (ff.restrict[0].get("least"), ff.restrict[0].get("evaluation")) == (4, 2)


def test_means_are_over_draws_then_domains_then_seeds():
  def case(domain, bits, documents=0, share=1.0):
    return dict(domain=domain, share=share, documents=documents, draw=0, bits=bits)

  found = [
    dict(
      arm="a", seed=0, alike=0.5, cases=[case("x", 1.0), case("y", 2.0), case("y", 4.0)]
    ),
    dict(arm="a", seed=1, alike=0.7, cases=[case("x", 5.0), case("y", 5.0)]),
  ]
  assert emo.means(found) == {"a": {(0, 1.0): (2.0 + 5.0) / 2}}
  assert "alike by 0.600" in emo.table(found, against=None)[-1]
  with pytest.raises(ValueError, match="--against b"):
    emo.table(found, against="b")


def test_the_plot_has_a_panel_for_each_domain(tmp_path):
  pytest.importorskip("matplotlib")
  from experiments.reporting.extraction import draw

  def case(domain, share, documents, bits):
    return dict(domain=domain, share=share, documents=documents, draw=0, bits=bits)

  some = [(1.0, 0, 2.0), (0.25, 5, 2.5), (0.25, 0, 3.0)]
  cases = [case(domain, *each) for domain in ("code", "prose") for each in some]
  draw([dict(arm="pool=none", cases=cases)], tmp_path / "plot.svg")
  text = (tmp_path / "plot.svg").read_text()
  for word in ("code", "prose", "pool=none, 5", "pool=none, random", "25%"):
    assert word in text


def test_domains_that_use_other_experts_are_not_alike(tmp_path):
  folder = epath.Path(tmp_path)
  assert extraction.similarity(folder) is None
  layers = [{"name": "a", "load": [[3, 0], [0, 5], [0, 0]]}]
  (folder / "evaluation.json").write_text(json.dumps({"layers": layers}))
  assert extraction.similarity(folder) == 0


def test_a_domain_with_too_few_documents_is_refused(trained, cache, capsys):
  given = [str(trained), "--cache", str(cache), "--keep", "0.5", "--documents", "9999"]
  assert emo.main([*given, "--domains", "code"]) == 2
  assert "domain 'code' has" in capsys.readouterr().err
  assert emo.main([*given, "--domains", "cde"]) == 2
  assert "did you mean 'code'" in capsys.readouterr().err
