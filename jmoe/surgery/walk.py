"""A model run on calibration text: each sparse layer scored, and changed, in turn.

What a layer sees is what the layers before it give: changed ones, if they were changed.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jmoe import combine, dispatch
from jmoe._carrying import Experts
from jmoe.config import BlockConfig
from jmoe.models import blocks as modules
from jmoe.models.by_name import Blueprint, take_apart
from jmoe.surgery.frame import Layer, Model, blocks, rebuilt
from jmoe.surgery.receipt import Sample
from jmoe.types import Context, Params, Plan, valid_or_all
from jmoe.use import Use


class Seen(NamedTuple):
  """A batch at a sparse layer."""

  x_TD: Array  # the layer's input, after the norm
  y_TD: Array  # its output, a shared expert's included
  plan: Plan
  valid_T: Array  # bool[T] False for padding
  experts: tuple[Use, Params]

  def outputs(self) -> Array:
    """f[T,K,D] what each chosen expert gives, unweighted; zero where it was dropped.

    Raises:
      ValueError: the router has no fixed number of choices.
    """
    if self.plan.routing.k is None:
      raise ValueError(
        "outputs: the router gives tokens no fixed number of choices; use a score that "
        "reads none, such as surgery.mean_probability."
      )
    way = dispatch.sort if self.plan.capacity is None else dispatch.buckets
    home = combine.stack(self.plan)
    return way(self.x_TD, self.plan, Experts(*self.experts), home)


# What adds up over batches, f32[E] or of any other shape.
Score = Callable[[Seen], Array]
# (number of a sparse layer, the layer, its sum over batches) -> the layer in its place.
Change = Callable[[int, Layer, np.ndarray], Layer]


def walk(
  model: Model, samples: Sequence[Sample], score: Score, change: Change | None = None
) -> tuple[Model, list[np.ndarray]]:
  """The model with its sparse layers changed in order of depth, and their scores.

  Args:
    model: any; layers run as in evaluation.
    samples: packed rows, best of one shape; padding must count in no score.
    score: of a batch at a layer, traced once for equal layers and shapes, if it is the
      same function at every call.
    change: takes a layer when all batches were scored on it; later layers see what it
      gives after the change.  None: nothing is changed.

  Returns:
    The model, and f64 sums over batches of each sparse layer, in order of depth.

  Raises:
    ValueError: no samples.
  """
  if not samples:
    raise ValueError("walk: samples=[] hold nothing to score; give one or more.")
  embed = model.module().embed
  places = [_place(sample) for sample in samples]
  states = [embed(p.tokens).astype(model.config.dtype) for p in places]
  made, sums = [], []
  for depth, block in enumerate(blocks(model)):
    run = functools.partial(
      _run,
      *jax.device_put((dict(block.params), dict(block.state))),  # once for all batches
      score=score if block.sparse else None,
      made=_blueprint(block.config, model.config.d_model, model.config.dtype),
    )
    found = [run(x, p, depth) for x, p in zip(states, places, strict=True)]
    if block.sparse:
      sums.append(np.sum([np.asarray(s, np.float64) for _, s in found], axis=0))
    if block.sparse and change is not None:
      block = block.with_layer(change(len(sums) - 1, block.layer, sums[-1]))
      run = functools.partial(
        _run,
        *jax.device_put((dict(block.params), dict(block.state))),
        score=None,
        made=_blueprint(block.config, model.config.d_model, model.config.dtype),
      )
      found = [run(x, p, depth) for x, p in zip(states, places, strict=True)]
    states = [x for x, _ in found]
    made.append(block)
  return (model if change is None else rebuilt(model, made)), sums


def fed(model: Model, sample: Sample) -> list[np.ndarray]:
  """f32[T,D] that each block's feed-forward is given, sparse or dense, by depth.

  Args:
    model: any; runs as in evaluation.
    sample: packed rows; padding is left out.
  """
  place = _place(sample)
  x_BSD = model.module().embed(place.tokens).astype(model.config.dtype)
  valid_BS = np.ones(place.tokens.shape, bool)
  if place.segment is not None:
    valid_BS = np.asarray(place.segment) > 0
  found = []
  for depth, block in enumerate(blocks(model)):
    made = _blueprint(block.config, model.config.d_model, model.config.dtype)
    arrays = jax.device_put((dict(block.params), dict(block.state)))
    h_BSD, x_BSD = _given(*arrays, x_BSD, place, depth, made=made)
    found.append(np.asarray(h_BSD, np.float32)[valid_BS])
  return found


@functools.partial(jax.jit, static_argnames="made")
def _given(params, state, x_BSD: Array, place: "_Place", depth: int, *, made):
  """(what the feed-forward is given, what the block gives)."""
  block: Any = made.model(params, state)
  h_BSD = modules.normed(block.attention_norm, x_BSD)
  x_BSD += block.attention(h_BSD, place.position, place.segment)
  h_BSD = modules.normed(block.ff_norm, x_BSD)
  return h_BSD, block.feed(x_BSD, _context(place, depth))[0]


class _Place(NamedTuple):
  """What blocks ask about the tokens of a batch, i32[B,S] each."""

  tokens: Array
  segment: Array | None
  position: Array


def _place(sample: Sample) -> _Place:
  tokens = jnp.asarray(sample.inputs)
  segment = None if sample.segment is None else jnp.asarray(sample.segment)
  if sample.position is not None:
    return _Place(tokens, segment, jnp.asarray(sample.position))
  row_S = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  return _Place(tokens, segment, jnp.broadcast_to(row_S, tokens.shape))


def _context(place: _Place, depth: int) -> Context:
  return Context(
    valid=None if place.segment is None else place.segment > 0,
    segment=jnp.ones_like(place.tokens) if place.segment is None else place.segment,
    token_id=place.tokens,
    layer=jnp.asarray(depth, jnp.int32),
    num_rows=place.tokens.shape[0],
  )


@functools.lru_cache(maxsize=64)
def _blueprint(config: BlockConfig, d_model: int, dtype: str) -> Blueprint:
  """The structure of one block; nothing is computed."""
  given: dict[str, Any] = dict(dtype=jnp.dtype(dtype), depth_scale=1.0)

  def make() -> modules.Block:
    return modules.Block(config, d_model, **given, rngs=nnx.Rngs(0))

  return take_apart(nnx.eval_shape(make))[0]


@functools.partial(jax.jit, static_argnames=("score", "made"))
def _run(
  params: Any,
  state: Any,
  x_BSD: Array,
  place: _Place,
  depth: int,
  *,
  score: Score | None,
  made: Blueprint,
) -> tuple[Array, Array | None]:
  """What a block gives, and its score if it is asked for."""
  block: Any = made.model(params, state)
  context = _context(place, depth)
  h_BSD = modules.normed(block.attention_norm, x_BSD)
  x_BSD += block.attention(h_BSD, place.position, place.segment)
  if score is None:
    return block.feed(x_BSD, context)[0], None
  h_BSD = modules.normed(block.ff_norm, x_BSD)
  skip = x_BSD if block.skips else None  # the layer then adds it itself
  y_BSD, info = block.moe(h_BSD, context=context, residual=skip, with_plan=True)
  if skip is not None:
    y_BSD -= skip
  D = x_BSD.shape[-1]
  h_TD, y_TD = h_BSD.reshape(-1, D), y_BSD.reshape(-1, D)
  flat = Context(valid=None if context.valid is None else context.valid.reshape(-1))
  seen = Seen(
    h_TD,
    y_TD,
    info.plan,
    valid_or_all(flat, h_TD.shape[0]),
    (block.moe.config.experts, block.moe.params()["experts"]),
  )
  return x_BSD + y_BSD, score(seen)
