"""Experts trained apart beside one public model, joined and taken out again (FlexOlmo).

`begin` -> train the new expert and its gate column on text of its own, all else held by
`FREEZE` -> `join` with those that others trained -> `without` one of them.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import numpy as np

from jmoe._value_checks import whole
from jmoe.surgery import dense
from jmoe.surgery.columns import together
from jmoe.surgery.cut import cut
from jmoe.surgery.frame import Model, blocks, on_layers, rebuilt
from jmoe.surgery.grow import inputs
from jmoe.surgery.merge import joined_block
from jmoe.surgery.receipt import Sample
from jmoe.use import shown

# For `Optim.freeze` of what `begin` gives: all but expert 1 and its column.
FREEZE = ("embedding", "matrix", "norm", "experts:0", "columns:0")


def begin(
  public: Model, public_text: Sequence[Sample], own_text: Sequence[Sample]
) -> Model:
  """The public model with a copy of each feed-forward beside it, as experts 0 and 1.

  Shi et al. 2025, arXiv 2507.07024: gate columns are embeddings of the text that an
  expert is for.  Theirs come of an embedding model; here they are the feed-forward's
  mean input on that text, to length 1, layer by layer.

  Args:
    public: a dense model.
    public_text: packed rows of what it is for.
    own_text: of what the new expert is for.

  Raises:
    ValueError: blocks that are not dense, or no text.
  """
  made = []
  for block in blocks(public):
    one = {name: np.asarray(x) for name, x in dense.of_block(block).items()}
    twice = {name: np.stack([x, x]) for name, x in one.items()}
    # Under equal weights two equal experts are the dense feed-forward.
    none_DE = np.zeros((public.config.d_model, 2), np.float32)
    made.append(joined_block(block, twice, none_DE, 2))
  model = rebuilt(public, made)
  columns = [inputs(model, text) for text in (public_text, own_text)]

  def change(n, layer):
    gate_DE = np.stack([_unit(each[n]) for each in columns], axis=1)
    return layer._replace(params={**layer.params, "gate": {"kernel_DE": gate_DE}})

  return on_layers(model, change)


def join(parts: Sequence[Model], *, k: int = 2) -> Model:
  """One model of the public expert, number 0, and every part's own, from 1 on.

  Nothing is trained.  Weights are a softmax over a token's k highest logits.

  Args:
    parts: of `begin` with one public model, each then trained under `FREEZE`.
    k: choices per token, 2 or more, or as many as there are experts.

  Raises:
    ValueError: no part, one that has no two experts, or one whose frozen arrays are not
      those of the first one to the bit; k below 2.
  """
  if not parts or any(layer.config.num_experts != 2 for layer in _layers(parts)):
    raise ValueError(f"join: {len(parts)} parts; give models that `begin` made.")
  if not whole(k) or k < 2:
    raise ValueError(
      f"join: k={shown(k)}; give 2 or more, since one weight of a softmax over the "
      "chosen is always one."
    )
  first = parts[0]
  for n, part in enumerate(parts[1:], 1):
    public = [without(model, 1) for model in (first, part)]
    theirs = [n for n in public[0].params if not _same(public[0], public[1], n)]
    if public[0].config != public[1].config or theirs:
      raise ValueError(
        f"join: part {n} has another {shown(theirs or 'configuration')}; give parts of "
        "one public model, trained under flex.FREEZE."
      )
  others = [[b.layer for b in blocks(part)] for part in parts]

  def change(n, layer):
    own = [cut(each[n], [1]) for each in others]
    k_here = min(k, 1 + len(own))
    return together([cut(layer, [0]), *own], k=k_here)

  return on_layers(first, change)


def without(model: Model, number: int) -> Model:
  """The model without one expert, as if its part had never been joined.

  Args:
    model: of `join`, or any with sparse layers.
    number: of the expert in every layer.

  Raises:
    ValueError: no such expert.
  """

  def change(_, layer):
    E = layer.config.num_experts
    if not 0 <= number < E:
      raise ValueError(f"without: number={number}; give one of 0 to {E - 1}.")
    return cut(layer, [e for e in range(E) if e != number])

  return on_layers(model, change)


def _layers(parts: Sequence[Model]):
  return [b.layer for part in parts for b in blocks(part) if b.sparse]


def _same(one: Model, other: Model, name: str) -> bool:
  return name in other.params and np.array_equal(one.params[name], other.params[name])


def _unit(column_D) -> np.ndarray:
  column_D = np.asarray(column_D, np.float64)
  return (column_D / np.linalg.norm(column_D)).astype(np.float32)
