"""What a run would be, printed; nothing is trained or written to its folder."""
# SPDX-License-Identifier: Apache-2.0

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments import batches, dataset, fitting, settings, tokens
from experiments.config import Run
from experiments.program import program
from experiments.sitting import Options
from experiments.spread import Spread
from jmoe.analysis import cost


def show(
  run: Run,
  texts: dataset.Texts,
  encoded: tokens.Encoded,
  options: Options,
) -> None:
  """Prints configuration, parameters, FLOPs, memory and data of a run.

  The step is compiled, for this machine's backend, to know its memory; over a mesh that
  of one device.
  """
  print(f"config of {run.name}")
  for path, value in settings.values(run):
    print(f"  {path} = {value}")
  counted = cost.parameters(run.model)
  per_token = 3 * cost.flops_per_token(run.model, seq=run.data.seq)
  trained = run.steps * run.data.batch * run.data.seq
  print(f"parameters  {counted.total:,} in all, {counted.active:,} met by a token")
  print(
    f"FLOPs       {per_token:,.0f} a trained token, {per_token * trained:.3g} in "
    f"{run.steps:,} steps of {run.data.batch * run.data.seq:,} tokens"
  )
  made = program(
    run,
    byte_lengths=encoded.vocabulary.byte_lengths,
    num_domains=len(texts.domains),
    spread=(over := fitting.of(run, options.mesh, strategy=options.strategy)),
  )
  state = jax.eval_shape(made.init)
  state = state if over is None else over.shapes(state)
  sizes = {
    "parameters": _bytes(state.params),
    "optimizer": _bytes(state.optimizer),
    "step": _temporary(run, made, state, over),
  }
  where = jax.default_backend()
  if over is not None:
    where = f"each of {over.mesh.size} {where} devices, {over.said(run.model)}"
  shown = ", ".join(f"{name} {_shown(size)}" for name, size in sizes.items())
  print(f"memory      {shown}, together {_shown(sum(sizes.values()))} on {where}")
  _show_data(run, texts, encoded, trained)


def _show_data(
  run: Run, texts: dataset.Texts, encoded: tokens.Encoded, trained: int
) -> None:
  print(f"data        {run.data.corpus}, sha256 {texts.digest[:16]}")
  print(f"  {'':<16}{'to train on':>24}{'held out':>24}")
  rows = dict(enumerate(texts.domains)) | {None: "all"}
  counts = [_by_domain(split) for split in (texts.train, texts.held_out)]
  for number, name in rows.items():
    cells = [
      f"{documents:>9,} of {_shown(size):>11}"
      for documents, size in (count[number] for count in counts)
    ]
    print(f"  {name:<16}" + "".join(cells))
  once = len(encoded.train.tokens) - len(encoded.train.ends)
  print(
    f"  {once:,} tokens to learn; the run sees at most {trained:,}, "
    f"{trained / max(once, 1):.2f} epochs"
  )


def _by_domain(documents: Sequence[Any]) -> Mapping[int | None, tuple[int, int]]:
  """Number of a domain, or None for all -> (documents, bytes)."""
  found: dict[int | None, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
  for document in documents:
    for key in (int(document["domain"]), None):
      number, size = found[key]
      found[key] = number + 1, size + len(document["text"])
  return found


def _temporary(run: Run, made: Any, state: Any, over: Spread | None) -> int:
  """Bytes that a compiled step needs beside its state, on each device."""
  if over is None:
    batch = batches.shapes(run.data.batch, run.data.seq)
    step = jax.jit(made.train_step, donate_argnums=0)
    compiled = step.lower(state, batch).compile()
  else:
    lowered = over.train_step(made).lower(state, over.batch_shapes(run))
    compiled = lowered.compile()
  analysis = compiled.memory_analysis()
  assert analysis is not None  # CPU, GPU and TPU have one
  return analysis.temp_size_in_bytes


def _bytes(tree: Any) -> int:
  """On a device, where the arrays lie on several."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    total += math.prod(shape) * x.dtype.itemsize
  return total


def _shown(size: int) -> str:
  """Bytes, readable.

  >>> _shown(999), _shown(2048), _shown(3 * 2**29)
  ('999 bytes', '2.0 KiB', '1.5 GiB')
  """
  for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if size >= unit:
      return f"{size / unit:,.1f} {name}"
  return f"{size} bytes"
