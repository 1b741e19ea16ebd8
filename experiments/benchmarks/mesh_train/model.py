"""Published models as runs over a mesh: configuration, batch, the job's step, FLOPs.

State, step and layout are those of a training run (`experiments.spread`): bfloat16
parameters with float32 copies and moments, AdamW, clipping, routing metrics.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import batches
from experiments.benchmarks.olmoe_step import size, training
from experiments.config import Data, Optim, Run
from experiments.program import Program, program
from experiments.spread import Spread
from experiments.state import TrainState
from jmoe.config import Attention, BlockConfig, ModelConfig
from jmoe.models import unrolled
from jmoe.parallel import mesh as meshes
from jmoe.presets import olmoe, qwen3_moe

STRATEGIES = (
  "all_gather",
  "all_gather+own_first",
  "ragged_all_to_all",
  "deduplicated",
)


def _olmoe(given: size.Size) -> ModelConfig:
  return training.config(given, "nothing", loop=True)


def _qwen3(layers: int, d_model: int, d_ff: int, experts: int, vocab: int):
  """Qwen3-30B-A3B (arXiv 2505.09388, table 2, and the released configuration)."""
  heads = d_model // 64
  attention = Attention(
    heads, num_kv_heads=heads // 8, head_dim=128, rope_theta=1e6, qk_norm="head"
  )
  sparse = qwen3_moe.layer(d_model=d_model, d_ff=d_ff, num_experts=experts)
  return ModelConfig(
    vocab_size=vocab,
    d_model=d_model,
    segments=(((BlockConfig(attention, sparse),), layers),),
    tied=False,
    dtype="bfloat16",
  )


class Model(NamedTuple):
  """A model and how it is timed unless a command says otherwise."""

  config: ModelConfig
  loss_weights: tuple[tuple[str, float], ...]
  rows: int  # of a GPU
  keep: str  # of `training.KEEPS`: what blocks keep for the backward pass
  loop: bool  # over layers: copies in each, but a program that does not grow with them


_OLMOE, _QWEN3 = (tuple(preset.LOSS_WEIGHTS.items()) for preset in (olmoe, qwen3_moe))
MODELS = {
  "olmoe-1b-7b": Model(_olmoe(size.Size()), _OLMOE, 4, "most", loop=False),
  "qwen3-30b-a3b": Model(
    _qwen3(48, 2048, 768, 128, 151936), _QWEN3, 2, "attention", loop=True
  ),
  "tiny": Model(_olmoe(size.TINY), _OLMOE, 2, "nothing", loop=False),
}


def configured(
  model: ModelConfig,
  *,
  keep: str,
  loop: bool = True,
  layers: int | None = None,
  room: float | None = None,
) -> ModelConfig:
  """The model as it is timed.

  Args:
    model: of one segment of equal blocks.
    keep: of `training.KEEPS`: what blocks keep for the backward pass.
    loop: over layers, or each by itself (`jmoe.models.unrolled`).
    layers: instead of its own number.
    room: rows that a device's buffer holds as a share of all devices' rows.
  """
  (((block,), repeat),) = model.segments
  block = dataclasses.replace(block, ff=dataclasses.replace(block.ff, max_rows=room))
  made = dataclasses.replace(
    model,
    segments=(((block,), layers or repeat),),
    remat=training.KEEPS[keep],
    future_drops=room is not None,
  )
  return made if loop else unrolled(made)


def run_of(
  model: ModelConfig,
  rows: int,
  seq: int,
  loss_weights: tuple[tuple[str, float], ...],
) -> Run:
  """A run of the model: AdamW, bfloat16 parameters with float32 copies."""
  return Run(
    name="measured",
    model=model,
    data=Data(max_bytes=1, seq=seq, batch=rows, eval_context=0),
    optim=Optim(learning_rate=3e-4, warmup_steps=1, schedule="constant"),
    loss_weights=loss_weights,
    steps=1000,
    save_every=1000,
    param_dtype="bfloat16",
  )


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of a model and its batch."""

  params: int
  active: int  # that a token meets, without the embedding, which is no product
  tokens: int
  flops: float  # 6 for each token and active parameter, and causal attention


def counts(model: ModelConfig, rows: int, seq: int) -> Counts:
  """Counted from shapes, of equal blocks."""
  block, layers = model.segments[0][0][0], model.num_layers
  _, like = training.shapes(model)
  params = sum(math.prod(x.shape) for x in like.values())
  sparse: Any = block.ff
  experts = sum(math.prod(x.shape) for n, x in like.items() if ".experts." in n)
  idle = experts * (sparse.num_experts - sparse.k) // sparse.num_experts
  active = params - idle - model.vocab_size * model.d_model
  heads = block.attention
  width = heads.num_heads * (heads.head_dim or model.d_model // heads.num_heads)
  attention = 6.0 * layers * rows * seq**2 * width
  return Counts(params, active, rows * seq, 6.0 * active * rows * seq + attention)


@dataclasses.dataclass(frozen=True)
class Job:
  """A run over some devices, as a training job makes it."""

  run: Run
  spread: Spread
  program: Program

  @property
  def like(self) -> TrainState:
    """Shapes of the state with their shardings."""
    return self.spread.shapes(jax.eval_shape(self.program.init))

  def begun(self) -> Any:
    """`() -> state` before the first step, lowered as `Spread.init` makes it."""
    at = self.spread.state(jax.eval_shape(self.program.init))
    with jax.set_mesh(self.spread.mesh):
      return jax.jit(self.program.init, out_shardings=at).lower()

  def lowered(self) -> Any:
    """`(state, batch of `put`) -> (state, metrics, routing)`; takes the state away."""
    step = self.spread.train_step(self.program)
    return step.lower(self.like, self.spread.batch_shapes(self.run))

  def put(self) -> dict[str, Any]:
    """A batch of random tokens, each scored on the next, one document a row."""
    data, vocab = self.run.data, self.run.model.vocab_size
    shape = (data.batch, data.seq)
    ids = np.random.default_rng(7).integers(0, vocab, (data.batch, data.seq + 1))
    made = {name: np.zeros(shape, np.int32) for name in batches.shapes(*shape)}
    made |= {"inputs": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:]}
    made["targets"] = made["targets"].astype(np.int32)
    made["scored"] += 1
    made["segment"] += 1
    made["position"] += np.arange(data.seq, dtype=np.int32)
    return self.spread.put(made)


def job(run: Run, sizes: Mapping[str, int], strategy: str) -> Job:
  """The run over the first devices that are here.

  Args:
    run: from `run_of`.
    sizes: of the mesh.
    strategy: of `STRATEGIES`; without an expert axis nothing travels.
  """
  devices = jax.devices()[: math.prod(sizes.values())]
  mesh = meshes.make(sizes, devices=devices)
  used = strategy if sizes.get("expert", 1) > 1 else None
  spread = Spread(mesh, strategy=used)
  lengths = np.ones(run.model.vocab_size, np.int32)
  made = program(run, byte_lengths=lengths, num_domains=1, spread=spread)
  return Job(run, spread, made)


def gigabytes(tree: Any) -> float:
  """What one device holds of arrays with shardings, or of shapes with them."""
  total = 0
  for x in jax.tree.leaves(tree):
    total += math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
  return total / 1e9
