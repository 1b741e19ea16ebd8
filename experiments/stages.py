"""Experiments of several stages: runs trained together, operated on, and compared.

What a stage leaves is its runs' folders, and a line of bits.jsonl for each run that was
evaluated.  What is there is not done again, so that the same command goes on where it
was stopped; what another command left there is refused, and so is what was made of a
run that was then made again (origins.json has digests of what each was made of).
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from experiments import (
  checkpoint,
  evaluate,
  intervals,
  job,
  metrics,
  opening,
  recorded,
  sitting,
  surgery,
  together,
  workdir,
)
from experiments.config import Run
from experiments.program import program
from experiments.signals import Stop

FILE = "bits.jsonl"
ORIGINS = "origins.json"
Bits = Mapping[str, float]  # domain, or "all", -> bits per byte


class Stages:
  """An experiment in its folder.

  Args:
    first: a run that says what is read; all others read the same text.
    out: local; made if missing.
    cache: of data sets and compiled code.
    command: that was typed.
    stop: asked between two steps.

  Raises:
    BadData: the data set cannot be read.
  """

  def __init__(
    self,
    first: Run,
    out: epath.Path,
    cache: Path,
    *,
    command: Sequence[str],
    stop: Stop,
  ):
    self.out, self.cache, self.command, self.stop = out, cache, command, stop
    texts, encoded = job.loaded(first, cache)
    held_out = list(opening.held_out_batches(first, encoded))
    self.reading = together.Reading(texts, encoded, held_out)
    out.mkdir(parents=True, exist_ok=True)
    found = metrics.kept(out / FILE, sys.maxsize)
    self._records = {(r["stage"], r["seed"]): r for r in found}
    self._bits: dict[str, dict[int, Bits]] = {}
    noted = out / ORIGINS
    self._origins = json.loads(noted.read_text()) if noted.exists() else {}
    self._steps: dict[Any, Any] = {}

  @property
  def domains(self) -> tuple[str, ...]:
    """Those of which something is held out."""
    sizes = evaluate.domain_sizes(self.reading.texts.held_out, self._names)
    return tuple(name for name in self._names if name in sizes)

  @property
  def _names(self) -> tuple[str, ...]:
    return self.reading.texts.domains

  def train(self, found: Mapping[tuple[str, int], tuple[Run, epath.Path]]) -> None:
    """Trains what is missing of some runs as one program, and notes their bits.

    Args:
      found: by stage and seed, runs and their folders; alike but for names, seeds,
        text, and where they start from.

    Raises:
      BadCheckpoint, BadConfig, Diverged, Stopped: see `experiments.together`.
      ValueError: a folder is of another run, or started from another.
    """
    for run, folder in found.values():
      workdir.check(run, folder, "--out")
      if run.start_from:
        self._check_origins(folder, [run.start_from])
    missing = [key for key in found if not _finished(found[key][1])]
    done = len(found) - len(missing)
    names = ", ".join(dict.fromkeys(stage for stage, _ in found))
    print(f"{names}: {done} of {len(found)} trained before", file=sys.stderr)
    if missing:
      runs, folders = zip(*(found[key] for key in missing), strict=True)
      job.check(list(zip(runs, folders, strict=True)))
      together.finish(runs, folders, self.reading, command=self.command, stop=self.stop)
    for (stage, seed), (run, folder) in found.items():
      self._note(stage, seed, run.steps, _evaluation(folder))

  def operate(self, name: str, folder: epath.Path, *own: Any) -> Run:
    """Makes a run by an operation of `experiments.surgery`, if it is not there.

    Args:
      name: of the operation.
      folder: of the new run.
      *own: arguments but --out and --cache.

    Returns:
      The new run.

    Raises:
      Stopped: a signal came before.
      ValueError: it was made with other arguments, or of other runs.
      ValueError, OSError: as the operation.
    """
    words = [*map(str, own), "--out", str(folder), "--cache", str(self.cache)]
    asked = surgery.settings(name, words)
    origins = [asked["workdir"], *asked.get("others", [])]
    if not folder.exists():
      self.stop.check(0)
      self._check_origins(folder, origins)
      surgery.operate(name, words)
      return recorded.config(folder)
    receipt = folder / "receipt.json"
    made = json.loads(receipt.read_text()) if receipt.exists() else {}
    settings = made.get("settings", {})
    settings.pop("step", None)  # of what was read; no argument
    old = {"operation": made.get("operation"), **settings}
    new = json.loads(json.dumps({"operation": name, **asked}))
    if found := workdir.differences(old, new):
      raise ValueError(
        f"--out {folder} was made by another command: {workdir.listed(found)}; give "
        "another --out, or the same arguments."
      )
    self._check_origins(folder, origins)
    return recorded.config(folder)

  def _check_origins(self, folder: epath.Path, names: Sequence[str]) -> None:
    """Notes the runs that a new one is made of; raises if one is another by now."""
    now = {n: checkpoint.digest(epath.Path(n) / "checkpoints") for n in names}
    key = str(folder.relative_to(self.out))
    if not folder.exists():
      self._origins[key] = now
      workdir.write_json(self.out / ORIGINS, self._origins)
      return
    if key not in self._origins:
      print(f"note: {folder} is of an earlier version; see that it was made of "
            f"{', '.join(names)} as now.", file=sys.stderr)  # fmt: skip
      return
    if changed := [n for n in names if now[n] != self._origins[key].get(n)]:
      raise ValueError(
        f"{folder} was made before {changed[0]} was made again; remove {folder} to "
        "make it again too, or give another --out."
      )

  def evaluate(self, stage: str, seed: int, run: Run, folder: epath.Path) -> None:
    """Notes the bits of a run's newest checkpoint, as one that is not trained yet."""
    saved: Any = checkpoint.read(folder / "checkpoints")
    if not (folder / "evaluation.json").exists():
      like = dataclasses.replace(
        run, name="evaluated", seed=0, data=dataclasses.replace(run.data, seed=0)
      )
      sitting.evaluated(
        run,
        folder,
        saved._replace(
          params=dict(jax.device_put(saved.params)),
          balance=dict(jax.device_put(saved.balance)),
        ),
        self._eval_step(like),
        self.reading.texts,
        self.stop.between(self.reading.held_out, saved.step),
      )
    self._note(stage, seed, saved.step, _evaluation(folder))

  def bits(self, stage: str) -> dict[int, Bits]:
    """By seed, what this command noted of a stage; not what others left."""
    return self._bits.get(stage, {})

  def mean(self, stage: str, domain: str) -> float:
    """Bits of a domain, over the seeds of a stage."""
    return intervals.student([b[domain] for b in self.bits(stage).values()]).mean

  def _eval_step(self, run: Run) -> Any:
    made = program(
      run,
      byte_lengths=self.reading.encoded.vocabulary.byte_lengths,
      num_domains=len(self._names),
    )
    # One function for all models of one structure.
    return self._steps.setdefault(made.blueprint, jax.jit(made.eval_step))

  def _note(self, stage: str, seed: int, step: int, bits: Bits) -> None:
    self._bits.setdefault(stage, {})[seed] = bits
    record = {"step": step, "stage": stage, "seed": seed, "bits": dict(bits)}
    self._records[stage, seed] = record
    lines = metrics.Lines(self.out / FILE, list(self._records.values()))
    lines.close()


def _evaluation(folder: epath.Path) -> Bits:
  return json.loads((folder / "evaluation.json").read_text())["bits_per_byte"]


def _finished(folder: epath.Path) -> bool:
  path = folder / "summary.json"
  return path.exists() and bool(json.loads(path.read_text())["finished"])
