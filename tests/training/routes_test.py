"""What `experiments.routes` counts, against loops over pieces that nobody packed."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import itertools
import json
import math
import types

import jax
import numpy as np
import pytest
from etils import epath

from experiments import checkpoint, choices, counting, lexemes, opening, routes, workdir
from experiments.operations._source import Source
from jmoe.config import BlockConfig, Dense
from tests import _cases

HOW = dict(documents=2, pieces=3, draws=4, seed=0)


@pytest.fixture(autouse=True)
def _compiled_quickly(monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  with _cases.quickly():
    yield


@pytest.fixture(scope="module")
def twice(job, texts, encoded, tmp_path_factory):
  """A run of `micro` with the same parameters at steps 0 and 1."""
  folder = epath.Path(tmp_path_factory.mktemp("routes") / "micro")
  workdir.claim(job.run, folder)
  saved = checkpoint.Checkpoints(
    folder / "checkpoints", opening.facts(job.run, texts, encoded)
  )
  batches, state = opening.training_batches(job.run, encoded), job.init()
  saved.save(state, batches)
  saved.save(dataclasses.replace(state, step=state.step + 1), batches)
  saved.close()
  return folder


def test_documents_are_counted_as_by_a_loop_over_their_pieces(twice, cache):
  found, is_new = counting.counted(twice, cache, **HOW)
  assert is_new and json.loads((twice / counting.FILE).read_text()) == found
  source = Source(twice, cache)
  held_out, seq = source.encoded.held_out, source.run.data.seq
  some = choices.pieces(held_out, seq=seq, documents=2, per_document=3, seed=0)
  begins = np.concatenate([[0], held_out.ends[:-1]])
  # Each piece is a row of its own, padded at its end.
  rows_PS = np.zeros((len(some.first), seq), np.int32)
  lengths = []
  for p, (number, first) in enumerate(zip(some.document, some.first, strict=True)):
    inputs = held_out.tokens[begins[number] : held_out.ends[number] - 1]
    part = inputs[first : first + seq]
    rows_PS[p, : len(part)] = part
    lengths.append(len(part))
  real_PS = np.arange(seq) < np.array(lengths)[:, None]
  model = source.model.module()

  @jax.jit
  def asked(tokens_PS, segment_PS):
    _, (info,) = model.hidden(
      tokens_PS, segment_PS, look=lambda plan: plan.routing.expert
    )
    return info.plan

  expert_PSK = np.asarray(asked(rows_PS, real_PS.astype(np.int32)))
  expert_PSK = expert_PSK.reshape(*rows_PS.shape, -1)
  numbers = sorted(set(some.document.tolist()))
  load, pairs = np.zeros((len(numbers), 4), int), np.zeros((4, 4), int)
  for p, s in zip(*np.nonzero(real_PS), strict=True):
    for e in expert_PSK[p, s]:
      load[numbers.index(some.document[p]), e] += 1
      for other in expert_PSK[p, s]:
        pairs[e, other] += 1
  (layer,) = found["layers"]
  np.testing.assert_array_equal(layer["load"], load)
  np.testing.assert_array_equal(layer["pairs"], pairs)
  assert found["tokens"] == sum(lengths) == real_PS.sum()
  domains = [int(held_out.domain[n]) for n in numbers]
  assert found["document_domain"] == domains and set(domains) == {0, 1, 2, 3}
  assert all(domains.count(d) <= 2 for d in domains)
  assert max(np.bincount(some.document)) <= 3


def test_information_is_of_the_same_choices_and_equal_checkpoints_are_stable(
  twice, cache, capsys
):
  found, _ = counting.counted(twice, cache, **HOW)
  (layer,) = found["layers"]
  domain = np.array(found["document_domain"])
  load_DE = np.stack([np.array(layer["load"])[domain == d].sum(0) for d in range(4)])
  p = load_DE / load_DE.sum()
  even = p.sum(0) * p.sum(1, keepdims=True)
  bits = (p * np.log2(np.where(p > 0, p / even, 1))).sum()
  rows = {(row["labels"], row["text"]): row for row in layer["information"]}
  np.testing.assert_allclose(rows["domain", "all"]["bits"], bits)
  assert rows["domain", "all"]["tokens"] == found["tokens"]
  # Only code is Python: the same tokens are asked about in three ways.
  python = {k: r for k, r in rows.items() if k[1] == "Python"}
  assert {k[0] for k in python} == {"document", "class", "token"}
  assert all(0 <= r["by_chance"] <= r["chance_at_most"] for r in rows.values())
  assert all(r["bits"] <= r["at_most"] + 1e-9 for r in rows.values())
  of_code = np.array(layer["load"])[domain == found["domains"].index("code")]
  begins = rows["document", "Python"]["tokens"] - rows["class", "Python"]["tokens"]
  assert np.array(layer["classes"]).sum() <= of_code.sum() and begins == 0
  (before,) = found["stability"]
  (kept,) = before["layers"]
  assert before["step"] == 0 and kept["equal"] == kept["shared"] == 1
  assert kept["equal_by_chance"] < 1

  # The command goes on where it was stopped, and only with the same arguments.
  given = [str(twice), "--cache", str(cache)]
  given += [f"--{name}={value}" for name, value in HOW.items()]
  assert routes.main(given) == 0
  said = capsys.readouterr().out
  assert "as it was" in said and "100.0 % of tokens keep their experts" in said
  old = (twice / counting.FILE).read_text()
  (twice / counting.FILE).write_text(old[: len(old) // 2])
  assert routes.main(given) == 0
  assert "as it was" not in capsys.readouterr().out
  assert json.loads((twice / counting.FILE).read_text()) == found


def test_python_tokens_have_the_class_of_their_byte(twice, cache):
  source = Source(twice, cache)
  some = choices.pieces(
    source.encoded.held_out, seq=32, documents=2, per_document=3, seed=0
  )
  now = choices.choices(source, some)
  domain_P = source.encoded.held_out.domain[some.document]
  kind_T, lexeme_T = counting._python(source, some, now, domain_P[now.piece])
  fits = {
    "operator": lambda c: not c.isalnum() and not c.isspace(),
    "space": lambda c: c.isspace() or c == "\\",
    "name": lambda c: c.isalnum() or c == "_" or c > "~",
    "keyword": str.isalpha,
    "number": lambda c: c.isalnum() or c in "._",
  }
  seen = set()
  for token, kind in zip(now.token.tolist(), kind_T.tolist(), strict=True):
    if kind >= 0:
      name = lexemes.CLASSES[kind]
      seen.add(name)
      assert name not in fits or fits[name](chr(token)), (name, chr(token))
  assert {"name", "operator", "space"} <= seen
  code = source.texts.domains.index("code")
  assert set(domain_P[now.piece[kind_T >= 0]].tolist()) == {code}
  inside = (domain_P[now.piece] == code) & (now.token < 256)
  np.testing.assert_array_equal(inside, kind_T >= 0)  # all but begins of documents
  # A word's bytes stand together, and are of one class.
  for lexeme in set(lexeme_T[lexeme_T >= 0].tolist()):
    assert len(set(kind_T[lexeme_T == lexeme].tolist())) == 1


def test_what_experts_know_for_certain_is_all_that_labels_hold():
  unit_T, label_U = np.repeat(np.arange(40), 5), np.arange(40) % 4
  uses_TE = np.eye(4, dtype=bool)[label_U[unit_T]]
  row = counting._Labels("domain", "all", unit_T, label_U)
  found = counting._told(row, uses_TE, draws=10, seed=0)
  assert math.isclose(found["bits"], 2) and math.isclose(found["at_most"], 2)
  assert found["by_chance"] < 0.4 and found["tokens"] == 200 and found["number"] == 4
  madow = 3 * 3 / (2 * 200) / math.log(2)
  assert math.isclose(found["miller_madow"], madow) and madow < found["by_chance"]


def test_chance_of_python_text_deals_domains_among_its_documents_alone(monkeypatch):
  """All ways to give four documents of two Python domains their labels."""
  domain_D = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 3])
  document_T = np.repeat(np.arange(10), 6)
  T = np.arange(60)
  kind_T = np.where(document_T < 4, 0, -1)
  monkeypatch.setattr(counting, "_python", lambda *_: (kind_T, np.where(kind_T, -1, T)))
  held_out = types.SimpleNamespace(domain=domain_D)
  source = types.SimpleNamespace(encoded=types.SimpleNamespace(held_out=held_out))
  some = types.SimpleNamespace(document=np.arange(10))
  now = types.SimpleNamespace(piece=document_T, token=T % 5)
  uses_TE = np.eye(3, dtype=bool)[(document_T + T % 3 // 2) % 3]
  (row,) = (
    row
    for row in counting._asked(source, some, now)  # type: ignore[arg-type]
    if (row.labels, row.text) == ("domain", "Python")
  )
  found = counting._told(row, uses_TE, draws=400, seed=0)

  def bits(ones):
    label_T = np.isin(document_T, ones).astype(int)[document_T < 4]
    load_LE = np.stack([uses_TE[:24][label_T == n].sum(0) for n in (0, 1)])
    p = load_LE / load_LE.sum()
    even = p.sum(0) * p.sum(1, keepdims=True)
    return (p * np.log2(np.where(p > 0, p / even, 1))).sum()

  each = [bits(ones) for ones in itertools.combinations(range(4), 2)]
  assert math.isclose(found["bits"], bits((2, 3)))
  assert math.isclose(found["chance_at_most"], max(each))
  np.testing.assert_allclose(found["by_chance"], np.mean(each), atol=0.05 * max(each))


def test_a_run_without_choices_and_bad_arguments_are_refused(
  twice, cache, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(Source, "__init__", dense(Source.__init__))
  assert routes.main([str(twice), "--cache", str(cache), "--draws", "1"]) == 2
  assert "has no sparse layer" in capsys.readouterr().err
  assert routes.main([str(tmp_path), "--cache", str(cache)]) == 2
  assert "holds no run" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    routes.main([str(twice), "--pieces", "0"])
  assert "'0' is not a whole number >= 1" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    routes.main([str(twice), "--seed", "-1"])
  assert "'-1' is not a whole number >= 0" in capsys.readouterr().err


def dense(own):
  """A source whose model is a dense block."""

  def init(self, *args, **kwargs):
    own(self, *args, **kwargs)
    (blocks, repeat), *_ = self.run.model.segments
    block = BlockConfig(blocks[0].attention, Dense(d_ff=32))
    model = dataclasses.replace(self.run.model, segments=(((block,), repeat),))
    self.run = dataclasses.replace(self.run, model=model, loss_weights=())
    kept = {n: x for n, x in self.model.params.items() if "segments.0.1" not in n}
    self.model = self.model._replace(config=model, params=kept, state={})

  return init
