"""What a run would be, printed; nothing is trained or written to its folder."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments import dataset, tokens
from experiments.config import Run
from experiments.program import program
from jmoe.analysis import cost
from jmoe.use import to_jsonable

_MIB = 2**20


def show(run: Run, texts: dataset.Texts, encoded: tokens.Encoded) -> None:
  """Prints configuration, parameters, FLOPs, memory and data of a run.

  The step is compiled, for this machine's backend, to know its memory.
  """
  print(f"config of {run.name}")
  for path, value in _flat(to_jsonable(run)):
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
  )
  state = jax.eval_shape(made.init)
  sizes = {
    "parameters": _bytes(state.params),
    "optimizer": _bytes(state.optimizer),
    "step": _temporary(run, made, state),
  }
  shown = ", ".join(f"{name} {size / _MIB:,.1f}" for name, size in sizes.items())
  print(
    f"memory      {shown}, together {sum(sizes.values()) / _MIB:,.1f} MiB "
    f"on {jax.default_backend()}"
  )
  _show_data(run, texts, encoded, trained)


def _show_data(
  run: Run, texts: dataset.Texts, encoded: tokens.Encoded, trained: int
) -> None:
  once = len(encoded.train.tokens) - len(encoded.train.ends)
  print(
    f"data        {run.data.corpus}, sha256 {texts.digest[:16]}; "
    f"{len(texts.train):,} documents to train on, {len(texts.held_out):,} held out"
  )
  ends = encoded.train.ends
  lengths = np.diff(ends, prepend=0) - 1
  for number, name in enumerate(texts.domains):
    chosen = encoded.train.domain == number
    print(
      f"  {name:<16}{chosen.sum():>8,} documents{lengths[chosen].sum():>14,} tokens"
    )
  print(f"  {once:,} tokens; the run sees at most {trained / max(once, 1):.2f} epochs")


def _temporary(run: Run, made: Any, state: Any) -> int:
  """Bytes that a compiled step needs beside its state."""
  names = ("inputs", "targets", "scored", "domain", "segment", "position")
  shape = jax.ShapeDtypeStruct((run.data.batch, run.data.seq), np.int32)
  step = jax.jit(made.train_step, donate_argnums=0)
  compiled = step.lower(state, dict.fromkeys(names, shape)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted path, value) of the leaves of a JSON tree."""
  if isinstance(value, dict) and value:
    children = value.items()
  elif isinstance(value, list) and any(isinstance(x, dict | list) for x in value):
    children = enumerate(value)
  else:
    yield path, value
    return
  for name, child in children:
    yield from _flat(child, f"{path}.{name}" if path else str(name))
