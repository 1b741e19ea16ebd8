"""Models so small that they compile in a second; the same for all tests here."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from jmoe import balance, experts, losses, routers, surgery
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.models import Decoder
from jmoe.models.by_name import take_apart
from jmoe.surgery.frame import blueprint
from jmoe.use import use

V, D, E, K = 13, 8, 6, 2


def layer(**fields) -> MoEConfig:
  own = dict(
    router=use(routers.top_k, k=K),
    experts=use(experts.glu, d_ff=5),
    shared=use(experts.glu, d_ff=5),
    losses=(use(losses.load_balance),),
  )
  return MoEConfig(D, E, **{**own, **fields})


def config(ff: MoEConfig | None = None, repeat: int = 2) -> ModelConfig:
  attention = Attention(num_heads=2)
  dense = BlockConfig(attention, Dense(6))
  sparse = BlockConfig(attention, layer() if ff is None else ff)
  segments = (((dense,), 1), ((sparse,), repeat))
  return ModelConfig(V, D, segments=segments, remat=False)


BALANCED = dataclasses.replace(layer(), balance=use(balance.update, rate=0.1))


@functools.cache
def model(config: ModelConfig, seed: int = 0) -> surgery.Model:
  """A model of drawn arrays; nothing is compiled for it."""
  shapes = take_apart(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1:]
  random = np.random.default_rng(seed)

  def drawn(name, x):
    value = random.normal(size=x.shape).astype(np.float32)
    fan_in = 1 if ".gate." in name or len(x.shape) < 2 else x.shape[-2]
    return 1 + value / 4 if name.endswith("scale") else value / np.float32(fan_in**0.5)

  params, state = ({n: drawn(n, x) for n, x in some.items()} for some in shapes)
  return surgery.Model(config, params, state)


def logits(model: surgery.Model, sample: surgery.Sample) -> np.ndarray:
  """f32[B,S,V] of a model."""
  return np.asarray(_run(*model[1:], sample, made=blueprint(model.config))[0])


def probs(model: surgery.Model, sample: surgery.Sample) -> list[np.ndarray]:
  """f32[T,E] of each sparse layer."""
  _, infos = _run(*model[1:], sample, made=blueprint(model.config))
  return [layer for info in infos for layer in np.asarray(info.plan)]


@functools.partial(jax.jit, static_argnames="made")
def _run(params, state, sample, *, made):
  return made.model(params, state)(*sample, look=lambda plan: plan.routing.probs)


def sample(rows: int = 3, seq: int = 16, seed: int = 0) -> surgery.Sample:
  """Three documents a row, then padding."""
  random = np.random.default_rng(seed)
  tokens = random.integers(0, V, (rows, seq)).astype(np.int32)
  lengths = [5, 7, seq - 14, 2]
  segment = np.tile(np.repeat([1, 2, 3, 0], lengths), (rows, 1)).astype(np.int32)
  position = np.concatenate([np.arange(n) for n in lengths])
  return surgery.Sample(tokens, segment, np.tile(position, (rows, 1)).astype(np.int32))
