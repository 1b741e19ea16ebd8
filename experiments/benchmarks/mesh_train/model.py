"""Published models over a mesh: configuration, state in its places, one step, FLOPs.

Parameters and moments are bfloat16 and laid out by the layer's table of rules; sparse
layers run in their own `shard_map`, the loss in one of its own, the rest is split by
XLA from shardings.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments.benchmarks.olmoe_step import size, training
from jmoe import dispatch
from jmoe.config import Attention, BlockConfig, ModelConfig
from jmoe.models import blocks, cross_entropy
from jmoe.parallel import EXPERT_FSDP, param_specs
from jmoe.parallel.rules import activation_spec
from jmoe.presets import olmoe, qwen3_moe
from jmoe.use import use

RULES = EXPERT_FSDP
STRATEGIES = ("all_gather", "ragged_all_to_all", "deduplicated")


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


# Name -> the model, weights of its losses, rows of a GPU, what blocks keep.
_OLMOE, _QWEN3 = (tuple(preset.LOSS_WEIGHTS.items()) for preset in (olmoe, qwen3_moe))
MODELS: dict[str, tuple[ModelConfig, tuple[tuple[str, float], ...], int, str]] = {
  "olmoe-1b-7b": (_olmoe(size.Size()), _OLMOE, 4, "most"),
  "qwen3-30b-a3b": (_qwen3(48, 2048, 768, 128, 151936), _QWEN3, 2, "attention"),
  "tiny": (_olmoe(size.TINY), _OLMOE, 2, "nothing"),
}  # fmt: skip


def configured(
  model: ModelConfig,
  *,
  strategy: str,
  keep: str,
  layers: int | None = None,
  room: float | None = None,
) -> ModelConfig:
  """The model with sparse layers over a mesh.

  Args:
    model: of one segment of equal blocks.
    strategy: of `jmoe.dispatch`.
    keep: of `training.KEEPS`: what blocks keep for the backward pass.
    layers: instead of its own number.
    room: rows that a device's buffer holds as a share of all devices' rows.
  """
  (((block,), repeat),) = model.segments
  sparse: Any = dataclasses.replace(
    block.ff, dispatch=use(getattr(dispatch, strategy)), sharding=RULES, max_rows=room
  )
  block = dataclasses.replace(block, ff=sparse)
  return dataclasses.replace(
    model, segments=(((block,), layers or repeat),), remat=training.KEEPS[keep]
  )


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of a model and its batch."""

  params: int
  active: int  # that a token meets, without the embedding, which is no product
  tokens: int
  flops: float  # 6 for each token and active parameter, and causal attention


def counts(model: ModelConfig, rows: int, seq: int) -> Counts:
  """Counted from shapes."""
  (((block,), layers),) = model.segments
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


def specs(like: Mapping[str, Any], mesh: Mesh) -> dict[str, P]:
  """The spec of each parameter, by its dotted name."""
  nested = traverse_util.unflatten_dict(dict(like), sep=".")
  found: Any = param_specs(nested, RULES, mesh.shape)
  return dict(traverse_util.flatten_dict(found, sep="."))  # type: ignore[arg-type]


def shardings(like: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
  """Of the state of `training.drawn`: moments lie as their parameters."""
  where = {name: NamedSharding(mesh, at) for name, at in specs(like, mesh).items()}
  return {"step": NamedSharding(mesh, P()), "params": where, "moments": (where, where)}


def drawn(like: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
  """A random state, each device's share made where it lies."""
  made = jax.jit(lambda: training.drawn(like), out_shardings=shardings(like, mesh))
  return made()


def batch(model: ModelConfig, rows: int, seq: int, mesh: Mesh) -> Array:
  """i32[rows,seq] random tokens, split by rows."""
  ids = np.random.default_rng(7).integers(0, model.vocab_size, (rows, seq))
  at = NamedSharding(mesh, activation_spec(3, RULES, mesh.shape))
  return jax.device_put(ids.astype(np.int32), at)


@functools.lru_cache(maxsize=4)
def compiled(
  model: ModelConfig,
  mesh: Mesh,
  rows: int,
  seq: int,
  loss_weights: tuple[tuple[str, float], ...],
) -> Any:
  """`(state, i32[rows,seq]) -> (state, losses)`, which takes the state away."""
  blueprint, like = training.shapes(model)
  step = functools.partial(
    training.train_step,
    blueprint=blueprint,
    chunk=None,
    in_backward=False,
    loss_weights=dict(loss_weights),
    cross_entropy=functools.partial(_loss, mesh),
  )
  where = shardings(like, mesh)
  state = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    jax.eval_shape(lambda: training.drawn(like)),
    where,
  )
  at = NamedSharding(mesh, activation_spec(3, RULES, mesh.shape))
  ids = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=at)
  out = where, NamedSharding(mesh, P())
  with jax.set_mesh(mesh):
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    return jitted.lower(state, ids).compile()


def _loss(mesh: Mesh, model, x_BSD, target_BS, weight_BS, *, chunk) -> Array:
  """The model's loss, each device over its own tokens: a loop over chunks of them."""
  at = activation_spec(3, RULES, mesh.shape)
  axes = tuple(a for a in RULES.tokens if mesh.shape.get(a, 1) > 1)

  def local(x_BSD, matrix_DV, target_BS, weight_BS):
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    each = target_BS.reshape(-1), weight_BS.reshape(-1)
    loss, _ = cross_entropy(x_TD, matrix_DV, *each, chunk=chunk)
    return lax.psum(loss, axes) if axes else loss

  found = jax.shard_map(
    local, mesh=mesh, in_specs=(at, P(), at, at), out_specs=P(), check_vma=True
  )
  x_BSD = blocks.normed(model.norm, x_BSD)
  return found(x_BSD, model.unembed.kernel[...], target_BS, weight_BS)


def gigabytes(tree: Any) -> float:
  """What one device holds of arrays with shardings, or of shapes with them."""
  total = 0
  for x in jax.tree.leaves(tree):
    total += math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
  return total / 1e9
