"""Several models made one: averaged, or their experts side by side."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmoe import dispatch, experts, gates, routers
from jmoe.assign import renormalise
from jmoe.config import MoEConfig
from jmoe.parallel.rules import letters
from jmoe.surgery import dense
from jmoe.surgery.columns import OF_EXPERTS, together
from jmoe.surgery.frame import Block, Layer, Model, blocks, rebuilt
from jmoe.types import wide
from jmoe.use import shown, use

_START = 0.02  # standard deviation of a new gate
_COUNTS = (".state.counted", ".state.batches")


def average(models: Sequence[Model]) -> Model:
  """The mean of each array of models of one configuration.

  Args:
    models: two or more; balance biases and buffers are averaged too, tables must be
      equal.

  Raises:
    ValueError: models that are not alike.
  """
  _alike("average", models, [model.config for model in models])
  first = models[0]
  params, state = (
    {name: _mean([getattr(m, field)[name] for m in models], name) for name in arrays}
    for field, arrays in (("params", first.params), ("state", first.state))
  )
  return Model(first.config, params, state)


def concatenate(
  models: Sequence[Model], *, rest: str = "average", k: int | None = None
) -> Model:
  """A model with the experts and the gate columns of several, the first one's first.

  Kim et al. 2021 (Z-Code M3, arXiv 2109.10465), aggregation of experts.  Where each
  parent's experts are is `offsets`; `cut_model` to one parent's gives it back, to the
  bit under rest="first".

  Args:
    models: alike but for numbers of experts and k.
    rest: what is not of experts: "average", or the "first" model's.
    k: choices per token; None: the first model's.

  Raises:
    ValueError: models that are not alike, or another `rest`.
  """
  if rest not in ("average", "first"):
    raise ValueError(f"concatenate: rest={rest!r}; give 'average' or 'first'.")
  parts = [blocks(model) for model in models]
  shapes = [
    [(b.config.attention, b.config.norm, b.sparse or b.config.ff) for b in each]
    for each in parts
  ]
  _alike("concatenate", models, shapes)
  if not any(block.sparse for block in parts[0]):
    raise ValueError("concatenate: the models have no sparse layer; see `mix`.")
  made = []
  for each in zip(*parts, strict=True):
    block = each[0] if rest == "first" else _averaged(each)
    if block.sparse:
      layer = together([b.layer for b in each], k=k)
      params = _of_experts(layer.params, block.layer.params)
      block = block.with_layer(layer._replace(params=params))
    made.append(block)
  return rebuilt(models[0] if rest == "first" else _outside(models), made)


def _of_experts(together: Any, rest: Any, part: str = "", name: str = "") -> Any:
  """Arrays with a part for each expert from the first tree, all others from `rest`."""
  if isinstance(together, Mapping):
    return {n: _of_experts(together[n], rest[n], part or n, n) for n in together}
  return together if part in OF_EXPERTS and "E" in letters(name) else rest


def offsets(models: Sequence[Model]) -> list[list[range]]:
  """For each sparse layer, the numbers that each model's experts have together."""
  found = []
  for each in zip(*(blocks(model) for model in models), strict=True):
    if each[0].sparse:
      sizes = [block.layer.config.num_experts for block in each]
      ends = np.cumsum([0, *sizes]).tolist()
      found.append([range(a, b) for a, b in zip(ends, ends[1:], strict=False)])
  return found


def mix(models: Sequence[Model], *, k: int = 2, seed: int = 0) -> Model:
  """Dense models, each trained on text of its own, as the experts of one sparse model.

  Sukhbaatar et al. 2024 (Branch-Train-MiX, arXiv 2403.07816): feed-forwards become
  experts under a new gate, all else is averaged; then the whole is trained, of which
  nothing is done here.

  Args:
    models: dense, of one configuration, best from one parent.
    k: choices per token; weights are a softmax over the chosen, as theirs.
    seed: of the gate, normal of deviation 0.02.

  Raises:
    ValueError: models that are not alike or not dense, or k of more than there are.
  """
  _alike("mix", models, [model.config for model in models])
  if not 0 < k <= len(models):
    raise ValueError(f"mix: k={k} of {len(models)} models; give 1 to that many.")
  random, made = np.random.default_rng(seed), []
  for each in zip(*(blocks(model) for model in models), strict=True):
    stacks = [dense.of_block(block) for block in each]
    matrices = {name: np.stack([m[name] for m in stacks]) for name in stacks[0]}
    shape = models[0].config.d_model, len(models)
    gate_DE = _START * random.standard_normal(shape)
    made.append(joined_block(_averaged(each), matrices, gate_DE.astype(np.float32), k))
  return rebuilt(_outside(models), made)


def joined_block(
  block: Block, matrices: Mapping[str, Any], gate_DE: Any, k: int
) -> Block:
  """A dense block whose feed-forward becomes these experts under this gate."""
  ff = block.config.ff
  assert not isinstance(ff, MoEConfig)
  config = MoEConfig(
    gate_DE.shape[0],
    gate_DE.shape[1],
    gate=use(gates.linear),
    router=use(routers.top_k, k=k),
    experts=use(
      experts.glu if ff.gated else experts.mlp,
      d_ff=int(matrices["up"].shape[-1]),
      activation=ff.activation,
    ),
    renormalise=use(renormalise.over_chosen if k > 1 else renormalise.never),
    dispatch=use(dispatch.sort),
  )
  params = {
    "gate": {"kernel_DE": gate_DE},
    "experts": dense.as_experts(dict(matrices)),
  }
  return block.with_layer(Layer(config, params))


def _alike(where: str, models: Sequence[Model], shapes: Sequence[Any]) -> None:
  if len(models) < 2:
    raise ValueError(f"{where}: {len(models)} model; give two or more.")
  for n, (model, shape) in enumerate(zip(models, shapes, strict=True)):
    outside = (model.config.vocab_size, model.config.d_model, model.config.tied)
    first = models[0].config
    if shape != shapes[0] or outside != (first.vocab_size, first.d_model, first.tied):
      raise ValueError(
        f"{where}: model {n} is {shown(model.config)}, not like the first, "
        f"{shown(first)}; give models of one configuration."
      )


def _mean(arrays: Sequence[Any], name: str) -> Any:
  """Their mean, exactly theirs where they are equal; equal integers stay as they are.

  Raises:
    ValueError: integers that differ.
  """
  first = arrays[0]
  if name.endswith(_COUNTS):
    return first * 0  # over the batches of an update; counted anew, as in `cut`
  if np.issubdtype(first.dtype, np.integer):
    if any(not np.array_equal(first, x) for x in arrays[1:]):
      raise ValueError("average: tables differ; the models chose by different ones.")
    return first
  start, *rest = (x.astype(wide(first)) for x in arrays)
  total = sum((x - start for x in rest), start * 0)
  return (start + total / len(arrays)).astype(first.dtype)


def _averaged(each: Sequence[Block]) -> Block:
  """A block with the mean of what all have in equal shapes, else the first one's."""
  first = each[0]

  def mean(field: str) -> dict[str, Any]:
    arrays = [getattr(block, field) for block in each]
    return {
      n: _mean([a[n] for a in arrays], n)
      if all(a[n].shape == x.shape for a in arrays)
      else x
      for n, x in arrays[0].items()
    }

  return Block(first.config, mean("params"), mean("state"))


def _outside(models: Sequence[Model]) -> Model:
  """The first model with embedding, norm and logits averaged."""
  first = models[0]
  params = {
    n: x if n.startswith("segments.") else _mean([m.params[n] for m in models], n)
    for n, x in first.params.items()
  }
  return first._replace(params=params)
