"""What every sparse layer of a model sees on a sample, and what its experts answer."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jmoe import combine
from jmoe.config import MoEConfig
from jmoe.join import add
from jmoe.layer import apply
from jmoe.models.blocks import Block, normed
from jmoe.models.decoder import Decoder, context_of
from jmoe.nnx import MoE
from jmoe.surgery.frame import Model, blueprint, layers
from jmoe.surgery.receipt import Sample
from jmoe.types import Context, Params, Plan
from jmoe.use import use


class Seen(NamedTuple):
  """Of one layer, summed over the tokens of a sample that are no padding."""

  input_D: np.ndarray  # mean of what the gate reads
  load_E: np.ndarray  # assignments that were kept
  probs_E: np.ndarray  # scores
  saliency_E: np.ndarray  # weight times norm of the output, over kept assignments


def observe(model: Model, samples: Sequence[Sample]) -> list[Seen]:
  """What each sparse layer saw and did, in order of depth.

  Args:
    model: with sparse layers.
    samples: rows of tokens, one or more, best of one shape.

  Raises:
    ValueError: no sample, a router without a fixed number of choices, or weights that
      multiply the experts' inputs.
  """
  for layer in layers(model):
    _check(layer.config)
  return [Seen(*each) for each in _on_host(model, samples) if len(each) > 1]


def inputs(model: Model, samples: Sequence[Sample]) -> list[np.ndarray]:
  """f32[D] of each block in order of depth: the mean input of its feed-forward.

  Args:
    model: with dense or sparse blocks.
    samples: rows of tokens, one or more; padding does not count.

  Raises:
    ValueError: no sample.
  """
  return [each[0] for each in _on_host(model, samples)]


def _on_host(model: Model, samples: Sequence[Sample]) -> list[tuple[np.ndarray, ...]]:
  """Of each block the mean input, and what adds up of sparse ones, as `Seen` has it."""
  if not samples:
    raise ValueError("observe: samples=[] hold nothing to see; give one or more.")
  arrays = dict(model.params), dict(model.state)
  total: Any = None
  for sample in samples:
    found = _observed(*arrays, sample, made=blueprint(model.config))
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  count, blocks = total
  return [(x_D / max(count, 1), *rest) for x_D, *rest in blocks]


def _check(config: MoEConfig) -> None:
  if config.k is None or config.scale != "output":
    raise ValueError(
      f"observe: router={config.router!r} with scale={config.scale!r}; what experts "
      "answer is told apart under token choice with scale='output' alone."
    )


def norms(
  params: Params,
  y_TKD: Array,
  plan: Plan,
  x_TD: Array,
  residual_TD: Array | None = None,
) -> Array:
  """f32[T,K]: weight times norm of each chosen expert's output; 0 if it was dropped."""
  del params, x_TD, residual_TD
  norm_TK = jnp.linalg.norm(y_TKD.astype(jnp.float32), axis=-1)
  kept_N = jnp.where(plan.kept, plan.routing.weight, 0)
  return norm_TK * kept_N.reshape(norm_TK.shape)


@functools.partial(jax.jit, static_argnames="made")
def _observed(params: Any, state: Any, sample: Sample, *, made: Any) -> Any:
  model = made.model(params, state)
  tokens_BS = jnp.asarray(sample.inputs)
  position_BS = sample.position
  if position_BS is None:
    position_BS = jnp.broadcast_to(
      jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape
    )
  context = context_of(tokens_BS, sample.segment)
  valid_BS = jnp.ones(tokens_BS.shape, bool) if context.valid is None else context.valid
  x_BSD = model.embed(tokens_BS).astype(model.config.dtype)
  found = []
  for layer, block in enumerate(_modules(model)):
    h_BSD = normed(block.attention_norm, x_BSD)
    x_BSD += block.attention(h_BSD, position_BS, sample.segment)
    here = dataclasses.replace(context, layer=jnp.int32(layer))
    h_BSD = normed(block.ff_norm, x_BSD)
    weight_BS1 = valid_BS[..., None].astype(jnp.float32)
    total_D = (h_BSD.astype(jnp.float32) * weight_BS1).sum((0, 1))
    seen = (total_D,)
    if block.sparse:
      seen += _seen(block.moe, h_BSD, here, valid_BS)
    found.append(seen)
    x_BSD, _ = block.feed(x_BSD, here)
  return valid_BS.astype(jnp.float32).sum(), found


def _modules(model: Decoder) -> list[Block]:
  """The blocks one by one, in order of depth."""
  found = []
  for (_, repeat), stacked in zip(model.config.segments, model.segments, strict=True):
    parts = [nnx.split(block) for block in stacked]
    for r in range(repeat):
      for graph, arrays in parts:
        one = jax.tree.map(lambda x, r=r: x[r], arrays)
        found.append(nnx.merge(graph, one))
  return found


def _seen(moe: MoE, h_BSD: Array, context: Context, valid_BS: Array) -> Any:
  config = dataclasses.replace(
    moe.config,
    combine=use(combine.stack),
    aggregate=use(norms),
    shared=None,
    join=use(add),
    losses=(),
  )
  params = {n: p for n, p in moe.params().items() if n in ("gate", "experts")}
  norm_BSK, info = apply(
    params, h_BSD, config, context=context, state=moe.get_state(), with_plan=True
  )
  plan = info.plan
  expert_N, kept_N = plan.routing.expert, plan.kept
  weight_T1 = valid_BS.reshape(-1, 1).astype(jnp.float32)
  zeros_E = jnp.zeros(config.num_experts)
  return (
    zeros_E.at[expert_N].add(kept_N.astype(jnp.float32)),
    (plan.routing.probs * weight_T1).sum(0),
    zeros_E.at[expert_N].add(norm_BSK.reshape(-1)),
  )
