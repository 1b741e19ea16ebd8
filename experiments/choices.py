"""Every choice of an expert that a checkpoint makes on pieces of held-out documents.

For `experiments.routes`, which counts them.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import data, routing, state as states
from experiments.operations._source import Source
from experiments.tokens import Tokens
from jmoe.types import Mixing, Plan


class Pieces(NamedTuple):
  """Parts of documents, each as long as a row of training or shorter."""

  tokens: Tokens  # pieces end to end; `domain` numbers them
  document: np.ndarray  # i32[pieces] number in the split
  first: np.ndarray  # i64[pieces] where it begins among the document's tokens


class Choices(NamedTuple):
  """What T tokens ask for, in the order of the rows."""

  piece: np.ndarray  # i32[T]
  place: np.ndarray  # i32[T] within the piece
  token: np.ndarray  # i32[T] its id
  layers: tuple[tuple[str, np.ndarray, int], ...]  # name, u8[T,E/8] packed bits, E

  def uses(self, layer: int) -> np.ndarray:
    """bool[T,E] of a layer."""
    _, bits, experts = self.layers[layer]
    return np.unpackbits(bits, axis=1, count=experts).astype(bool)


def pieces(
  some: Tokens, *, seq: int, documents: int, per_document: int, seed: int
) -> Pieces:
  """Pieces spread evenly over documents that are drawn, as many from every domain.

  Args:
    some: all documents of a split.
    seq: tokens of a piece at most.
    documents: of a domain, or all that it has.
    per_document: at most.
    seed: of the draw; fewer documents are part of more.
  """
  begins = np.concatenate([[0], some.ends[:-1]])
  parts, numbers, firsts = [], [], []
  for domain in range(int(some.domain.max(initial=-1)) + 1):
    (own,) = np.nonzero(np.asarray(some.domain) == domain)
    bits = np.random.PCG64([seed, domain]).random_raw(len(own))
    for number in sorted(own[np.argsort(bits, kind="stable")[:documents]].tolist()):
      inputs = int(some.ends[number] - begins[number]) - 1  # the end is no input
      windows = -(-inputs // seq)
      places = np.linspace(0, windows - 1, min(windows, per_document)).round()
      for first in (seq * places).astype(int).tolist():
        begin = begins[number] + first
        parts.append(some.tokens[begin : begin + min(seq, inputs - first) + 1])
        numbers.append(number)
        firsts.append(first)
  ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
  own = np.arange(len(parts), dtype=np.int32)
  cut = Tokens(np.concatenate(parts), ends, own, np.zeros(len(parts), np.int32))
  return Pieces(cut, np.array(numbers, np.int32), np.array(firsts, np.int64))


def choices(source: Source, some: Pieces) -> Choices:
  """What the model of a checkpoint asks for, as in evaluation.

  Args:
    source: run and checkpoint.
    some: pieces of its text.

  Raises:
    ValueError: a layer without choices, as of soft MoE, or no sparse layer.
  """
  of, model = source.run.data, source.run.model
  made, _ = states.blueprint(model, source.run.param_dtype)
  params, balance = jax.device_put(
    (dict(source.model.params), dict(source.model.state))
  )
  found: list[list[Any]] = []
  for batch in _rows(some, batch=of.batch, seq=of.seq):
    uses = _uses(
      params,
      balance,
      {name: batch[name] for name in ("inputs", "segment", "position")},
      blueprint=made,
    )
    if not uses:
      raise ValueError(f"{source.folder} has no sparse layer; give a run with one.")
    real_T = batch["segment"].reshape(-1) > 0
    layers = routing.by_depth(model, [np.asarray(stack) for stack in uses])
    names = [(name, uses_TE.shape[1]) for name, uses_TE in layers]
    found.append(
      [batch[name].reshape(-1)[real_T] for name in ("domain", "position", "inputs")]
      + [np.packbits(uses_TE[real_T], axis=1) for _, uses_TE in layers]
    )
  piece_T, place_T, token_T, *bits = map(np.concatenate, zip(*found, strict=True))
  layers = [(*name, x) for name, x in zip(names, bits, strict=True)]
  return Choices(piece_T, place_T, token_T, tuple((n, x, e) for n, e, x in layers))


def _rows(some: Pieces, *, batch: int, seq: int) -> Iterator[data.Batch]:
  """Packed; a window is a whole piece, so that places in it are those of the piece."""
  return data.one_pass(data.Windows(some.tokens, seq=seq), batch=batch, seq=seq)


@functools.partial(jax.jit, static_argnames="blueprint")
def _uses(
  params: states.Arrays,
  balance: states.Arrays,
  batch: dict[str, Array],
  *,
  blueprint: states.Blueprint,
) -> tuple[Array, ...]:
  """bool[R,T,E] of each stack of sparse layers."""
  model = blueprint.model(params, balance)
  _, infos = model.hidden(
    batch["inputs"], batch["segment"], batch["position"], look=_asked
  )
  return tuple(info.plan for info in infos)


def _asked(plan: Plan | Mixing) -> Array:
  """bool[T,E] before capacity; a sum of one-hot rows, as a scatter would be slow."""
  if isinstance(plan, Mixing):
    raise ValueError("routes: a soft router makes no choices; give a sparse one.")
  r = plan.routing
  if r.k is None:  # an expert's choices are not grouped by token
    shape = (r.num_tokens, r.num_experts)
    return jnp.zeros(shape, bool).at[r.token, r.expert].max(r.queues)
  expert_TK = jnp.where(r.queues, r.expert, -1).reshape(r.num_tokens, r.k)
  return jnp.any(expert_TK[:, :, None] == jnp.arange(r.num_experts), axis=1)
