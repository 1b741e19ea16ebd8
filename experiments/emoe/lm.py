"""Text for a language model: what it learns now, and what it may forget.

A dense run of ours goes on with documents of one domain.  A tenth of its training
documents chooses a rate; held-out windows of it, and of every domain that the run knew
before, test.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments import calibration, data, dataset, digests, tokens
from experiments.config import sparse_layers
from experiments.emoe.material import Material, Split
from experiments.errors import BadData
from experiments.operations._source import Source
from jmoe import surgery

_PACKED = 8  # rows at a time: only how they are packed depends on it


class Given(NamedTuple):
  """What is read of a run and a corpus."""

  material: Material
  domain: str  # that is learned; also the name of the task
  source: dict[str, Any]  # of model and text, for `jobs.Plan`


def given(
  folder: epath.Path, cache: Path, *, corpus: str | None, domain: str | None, few: int
) -> Given:
  """A run's model, and rows of text in its vocabulary.

  Args:
    folder: of a dense run.
    cache: of data sets.
    corpus: of the text to learn; None: the run's own.
    domain: of that corpus; None: it has one alone.
    few: windows of each domain that are asked about, at most.

  Raises:
    BadData: a model with sparse layers, or no such text.
    BadCheckpoint, Unreachable: see `experiments.recorded`.
  """
  source = Source(folder, cache)
  run = source.run
  if sparse_layers(run.model):
    raise BadData(f"--workdir {folder} has sparse layers; give a dense run.")
  of = run.data if corpus is None else dataclasses.replace(run.data, corpus=corpus)
  texts = dataset.load(cache, of)
  new = tokens.load(cache, texts, source.words)
  number = _domain(new.domains, domain, of.corpus)
  name = new.domains[number]
  if number not in new.held_out.domain:
    raise BadData(
      f"--corpus {of.corpus}: {name} has no held-out documents to test on; give it "
      "some of another source, state held_out for some, or name another --domain."
    )
  own = calibration.drawn(new.train, number, seed=0)
  if len(own) < 2:
    raise BadData(
      f"--corpus {of.corpus}: {name} has {len(own)} training documents; give two or "
      "more, one of which chooses a rate."
    )
  choose, train = np.split(own, [max(1, len(own) // 10)])
  seq, context = of.seq, of.eval_context

  def asked(some: tokens.Tokens, number: int) -> dict[str, np.ndarray]:
    return _rows(data.Windows(some, seq=seq, context=context).of(number), seq, few)

  learned = _rows(data.Windows(calibration.part(new.train, train), seq=seq), seq)
  chosen_by = asked(calibration.part(new.train, choose), number)
  test = {name: asked(new.held_out, number)}
  old, shares = source.encoded, dict(run.data.shares or ())
  for n, other in enumerate(old.domains):
    if other != name and shares.get(other, 1) > 0 and n in old.held_out.domain:
      test[other] = asked(old.held_out, n)
  if len(test) < 2:
    raise BadData(
      f"--workdir {folder}: its text has no domain but {name}; learn another one."
    )
  each = [learned, chosen_by, *test.values()]
  ends = np.cumsum([len(rows["inputs"]) for rows in each])
  training, choosing, *testing = np.split(np.arange(ends[-1]), ends[:-1])
  split = Split({name: training}, choosing, dict(zip(test, testing, strict=True)))
  whole = {n: np.concatenate([rows[n] for rows in each]) for n in _READ}
  # Fifteen models side by side: activations are computed again rather than kept.
  config = dataclasses.replace(run.model, remat=True)
  bits = math.log(2) * _bytes(whole, source.words.byte_lengths)
  read = Material(
    surgery.Model(config, source.model.params, source.model.state),
    {name: split},
    {name: whole},
    bits,
    "bits",
  )
  weights = digests.of_json(digests.digests(dict(source.model.params)))
  about = {"weights": weights, "step": source.step, "run": run.name}
  return Given(read, name, about | {"corpus": of.corpus, "text": texts.digest})


def layers(material: Material) -> tuple[int, ...]:
  """The authors' choice: of the even ones, from zero, the last that is not the end."""
  depth = material.dense.config.num_layers  # type: ignore[union-attr]
  return (max(0, (depth - 2) // 2 * 2),)


_READ = ("inputs", "targets", "scored", "segment", "position")


def _domain(domains: tuple[str, ...], name: str | None, corpus: str) -> int:
  if name is not None:
    return calibration.number(domains, name)
  if len(domains) > 1:
    raise BadData(f"--corpus {corpus} has {', '.join(domains)}; give --domain.")
  return 0


def _rows(windows: Any, seq: int, few: int | None = None) -> dict[str, np.ndarray]:
  """i32[M,S] by name: all windows, or a few that are drawn, packed into rows."""
  if few is not None and len(windows) > few:
    bits = np.random.PCG64(0).random_raw(len(windows))
    windows = data.OfDomain(windows, np.sort(np.argsort(bits, kind="stable")[:few]))
  each = list(data.one_pass(windows, batch=_PACKED, seq=seq))
  rows = {name: np.concatenate([one[name] for one in each]) for name in _READ}
  filled = rows["segment"].any(axis=1)  # the last ones are padding
  return {name: x[filled].astype(np.int32) for name, x in rows.items()}


def _bytes(rows: dict[str, np.ndarray], lengths: np.ndarray) -> np.ndarray:
  """i64[M]: bytes of text that a row is scored on; ends of documents have none."""
  counted = (rows["segment"] > 0) & (rows["scored"] > 0)
  return np.where(counted, np.asarray(lengths, np.int64)[rows["targets"]], 0).sum(1)
