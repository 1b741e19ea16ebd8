"""What an operation says about itself: what was kept, sizes, and how far outputs moved.

Written beside the new checkpoint as receipt.json.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.analysis import cost
from jmoe.models.by_name import Blueprint
from jmoe.surgery.frame import Model, blueprint


class Sample(NamedTuple):
  """Packed rows of tokens, on which outputs are compared."""

  inputs: Any  # i32[B,S]
  segment: Any = None  # i32[B,S]; 0 is padding
  position: Any = None  # i32[B,S]


@dataclasses.dataclass(frozen=True)
class Receipt:
  """Of one operation."""

  operation: str
  settings: Mapping[str, Any]  # what it was asked for
  # Of each sparse layer in order of depth: what of the source is there.
  kept: Sequence[Any]
  parameters: Mapping[str, tuple[int, int]]  # "total", "active": before and after
  moved: Mapping[str, float] | None  # see `moved`; None: there was no sample
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Plain lists, dicts, numbers and strings."""
    return _plain(dataclasses.asdict(self))

  def lines(self) -> list[str]:
    """The same for a terminal, without what each layer kept."""
    total, active = self.parameters["total"], self.parameters["active"]
    said = [
      f"{self.operation}: {total[0]:,} -> {total[1]:,} parameters, "
      f"{active[0]:,} -> {active[1]:,} active"
    ]
    if self.moved is not None:
      m = self.moved
      said.append(
        f"outputs on {m['tokens']:.0f} tokens: largest change of a logit "
        f"{m['largest']:.3g}, divergence {m['kl']:.3g} nats a token"
      )
    return said


def receipt(
  operation: str,
  before: Model,
  after: Model,
  *,
  settings: Mapping[str, Any],
  kept: Sequence[Any],
  sample: Sample | None = None,
  notes: Mapping[str, Any] | None = None,
) -> Receipt:
  """The receipt of an operation.

  Args:
    operation: its name.
    before: the model it was given; the first one, of several.
    after: the model it made.
    settings: what it was asked for, ready for JSON.
    kept: of each sparse layer, what of the source is there, ready for JSON.
    sample: on which both models run; None: outputs are not compared.
    notes: what else is worth keeping, ready for JSON.
  """
  counts = [cost.parameters(model.config) for model in (before, after)]
  return Receipt(
    operation,
    dict(settings),
    list(kept),
    {
      "total": (counts[0].total, counts[1].total),
      "active": (counts[0].active, counts[1].active),
    },
    None if sample is None else moved(before, after, sample),
    dict(notes or {}),
  )


def moved(before: Model, after: Model, sample: Sample) -> dict[str, float]:
  """How far the outputs of a model moved.

  Returns:
    Of the tokens that are no padding: `tokens`, their number; `largest`, the largest
    change of a logit; `kl`, the mean Kullback-Leibler divergence in nats of what comes
    next, after from before.  Zero and zero where outputs are equal bit by bit.

  Raises:
    ValueError: the models have different vocabularies.
  """
  sizes = [model.config.vocab_size for model in (before, after)]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f"moved: vocab_size={sizes[1]} after, {sizes[0]} before; outputs of different "
      "vocabularies cannot be compared, so leave out the sample."
    )
  old, new = (
    _logits(m.params, m.state, sample, made=blueprint(m.config))
    for m in (before, after)
  )
  valid = None if sample.segment is None else np.asarray(sample.segment) > 0
  return compared(old, new, valid)


def compared(old_BSV: Any, new_BSV: Any, valid_BS: Any = None) -> dict[str, float]:
  """What `moved` gives, of the logits of any two models, as of one's own.

  Args:
    old_BSV, new_BSV: f[B,S,V] before and after.
    valid_BS: bool[B,S], false for padding; None: all tokens count.
  """
  valid = np.ones(np.shape(old_BSV)[:-1], bool) if valid_BS is None else valid_BS
  largest, kl = _apart(old_BSV, new_BSV, valid)
  tokens = float(np.sum(valid))
  return {"tokens": tokens, "largest": float(largest), "kl": float(kl)}


@functools.partial(jax.jit, static_argnames="made")
def _logits(params, state, sample: Sample, *, made: Blueprint) -> Array:
  model = made.model(dict(params), dict(state))
  logits_BSV, _ = model(sample.inputs, sample.segment, sample.position)
  return logits_BSV


@jax.jit
def _apart(old_BSV: Array, new_BSV: Array, valid_BS: Array) -> tuple[Array, Array]:
  gap_BS = jnp.max(jnp.abs(new_BSV - old_BSV), axis=-1)
  old_BSV, new_BSV = jax.nn.log_softmax(old_BSV), jax.nn.log_softmax(new_BSV)
  kl_BS = jnp.sum(jnp.exp(old_BSV) * (old_BSV - new_BSV), axis=-1)
  count = jnp.maximum(jnp.sum(valid_BS, dtype=jnp.float32), 1)
  total = jnp.sum(jnp.where(valid_BS, kl_BS, 0.0))
  return jnp.max(jnp.where(valid_BS, gap_BS, 0.0)), total / count


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, np.ndarray | jax.Array):
    return np.asarray(value).tolist()
  return value.item() if isinstance(value, np.generic) else value
