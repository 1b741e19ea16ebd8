"""What a few experts of a model are worth: bits per byte of models cut to a domain.

Each case is a line of extraction.jsonl in the folder of the run, so that what was
measured once is not measured again.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from experiments import calibration, data, evaluate, metrics
from experiments.config import Run
from experiments.errors import BadData
from experiments.operations._source import Source
from experiments.program import program
from jmoe import surgery
from jmoe.analysis import specialisation
from jmoe.config import ModelConfig

FILE = "extraction.jsonl"


class Case(NamedTuple):
  """Which experts are kept for a domain."""

  domain: str
  share: float  # of the experts of each sparse layer
  documents: int  # for calibration; 0: drawn at random, or all are kept
  draw: int = 0  # seed of documents or experts


def cases(
  domains: Sequence[str],
  *,
  shares: Sequence[float],
  documents: Sequence[int],
  draws: int,
) -> Iterator[Case]:
  """All cases: the whole model once, others by documents, and `draws` at random."""
  for domain in domains:
    for share in shares:
      if share == 1:
        yield Case(domain, 1.0, 0)
        continue
      for count in documents:
        yield Case(domain, share, count)
      for draw in range(draws):
        yield Case(domain, share, 0, draw)


class Extraction:
  """The cases of one run.

  Args:
    source: the run.
    seed: of the documents that are drawn for calibration.
    most: bytes of held-out text of a domain, in whole documents drawn from the seed,
      but at least one; None: all there is.
  """

  def __init__(self, source: Source, *, seed: int = 0, most: int | None = None):
    self.source, self._seed, self._most = source, seed, most
    self._path = source.folder / FILE
    params, state = dict(source.model.params), dict(source.model.state)
    self._model = source.model._replace(  # there once, for all cases
      params=jax.device_put(params), state=jax.device_put(state)
    )
    self._samples = functools.lru_cache(maxsize=4)(self._read_samples)
    self._held_out = functools.lru_cache(maxsize=1)(self._read_held_out)
    self.done: dict[Case, float] = {}
    self._records = metrics.kept(self._path, source.step)
    for record in self._records:
      same = record.get("seed") == seed and record.get("most") == most
      if same and record["step"] == source.step:
        self.done[Case(*(record[name] for name in Case._fields))] = record["bits"]

  def measure(self, wanted: Sequence[Case], stop: Any = None) -> dict[Case, float]:
    """Bits per byte of all cases that are wanted, those done before included.

    Args:
      wanted: in any order; those of one domain beside each other are quickest.
      stop: an `experiments.signals.Stop`, asked between two cases; None: nobody.

    Raises:
      BadData: a domain that the corpus has not, or with too few documents.
      Stopped: a signal came; what was measured is kept.
    """
    lines = metrics.Lines(self._path, self._records)
    try:
      for case in wanted:
        if case in self.done:
          continue
        if stop is not None:
          stop.check(self.source.step)
        found, bits = self._one(case)
        self.done[case] = bits
        about = {"step": self.source.step, "seed": self._seed, "most": self._most}
        lines.add({**about, **case._asdict(), "bits": bits, "kept": found.kept})
    finally:
      lines.close()
    return {case: self.done[case] for case in wanted}

  def _one(self, case: Case) -> tuple[surgery.Extracted, float]:
    source = self.source
    number = calibration.number(source.texts.domains, case.domain, "--domains")
    sizes = [ff.num_experts for ff in surgery.layer_configs(self._model.config)]
    keep = [max(1, round(case.share * size)) for size in sizes]
    if not case.documents:
      found = surgery.at_random(self._model, keep=keep, seed=case.draw)
    else:
      samples = self._samples(number, case.documents)
      found = surgery.layerwise(self._model, samples, keep=keep)
    batches, size = self._held_out(number)
    step = self._eval_step(found.model.config)
    evaluated = evaluate.evaluation(
      lambda batch: step(dict(found.model.params), dict(found.model.state), batch),
      batches,
      {case.domain: size},
      source.texts.domains,
    )
    return found, float(evaluated.bits[case.domain])

  def _read_samples(self, number: int, count: int) -> list[surgery.Sample]:
    of = self.source.run.data
    return calibration.samples(
      self.source.encoded, number, count, seed=self._seed, batch=of.batch, seq=of.seq
    )

  def _read_held_out(self, number: int) -> tuple[list[data.Batch], int]:
    """Batches of a domain's held-out documents, and their bytes."""
    of, source = self.source.run.data, self.source
    held_out, texts = source.encoded.held_out, source.texts
    own = calibration.drawn(held_out, number, seed=self._seed)
    if not len(own):
      name = texts.domains[number]
      raise BadData(f"--domains {name}: no document of it is held out; leave it out.")
    sizes = np.array(
      [
        evaluate.domain_sizes([texts.held_out[int(n)]], texts.domains)["all"]
        for n in own
      ]
    )
    if self._most is not None:
      count = max(1, int((np.cumsum(sizes) <= self._most).sum()))
      own, sizes = own[:count], sizes[:count]
    own.sort()  # as they are in an evaluation of all domains
    windows = data.Windows(
      calibration.part(held_out, own), seq=of.seq, context=of.eval_context
    )
    batches = list(data.one_pass(windows, batch=of.batch, seq=of.seq))
    return batches, int(sizes.sum())

  def _eval_step(self, model: ModelConfig) -> Any:
    run = self.source.run
    # Of all seeds, as they differ in nothing that is compiled.
    of = dataclasses.replace(run.data, seed=0)
    run = dataclasses.replace(
      run, model=model, loss_weights=(), data=of, seed=0, start_from=""
    )
    lengths = tuple(self.source.words.byte_lengths.tolist())
    return _eval_step(run, lengths, len(self.source.texts.domains))


@functools.lru_cache(maxsize=16)
def _eval_step(run: Run, byte_lengths: tuple[int, ...], num_domains: int) -> Any:
  made = program(run, byte_lengths=np.array(byte_lengths), num_domains=num_domains)
  return jax.jit(made.eval_step)


def similarity(folder: epath.Path) -> float | None:
  """Mean cosine between domains' shares of the experts, over pairs and layers.

  Of the whole model on its held-out text, from evaluation.json; None without one.
  """
  path = folder / "evaluation.json"
  if not path.exists():
    return None
  found = []
  for layer in json.loads(path.read_text())["layers"]:
    load_DE = np.asarray(layer["load"], np.float64)
    load_DE = load_DE[load_DE.sum(1) > 0]
    pairs = np.triu_indices(len(load_DE), 1)
    found.append(specialisation.cosine(load_DE)[pairs].mean())
  return float(np.mean(found)) if found else None
