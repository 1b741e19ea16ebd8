"""A decoder-only language model: embedding, segments of blocks, norm, logits.

Layers of a segment are stacked and scanned over, so tracing and compiling do not grow
with depth; a segment that is not repeated is no loop (see `unrolled`).  `nnx.split`
makes it a pure function for a train step.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jmoe import keeping
from jmoe.config import ModelConfig, MoEConfig
from jmoe.models import _checks, blocks, over_mesh
from jmoe.models.cross_entropy import cross_entropy
from jmoe.nnx import check_rngs
from jmoe.types import Context, Info

# What happens before each block: (its number, its parameters, [B,S,D]) -> the last two.
Before = Callable[[int, Any, Array], tuple[Any, Array]]

# flax before 0.12 has no such type and holds modules in plain lists.
_List = getattr(nnx, "List", list)


class Decoder(nnx.Module):
  """Logits of the next token, from tokens.

  Args:
    config: the model.
    rngs: for the initial parameters.

  Raises:
    TypeError, ValueError: no configuration, or no random numbers to draw from.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    _checks.model_config(config)
    check_rngs("Decoder", rngs)
    self.config = config
    dtype = jnp.dtype(config.dtype)
    init = nnx.initializers.normal(config.d_model**-0.5)
    self.embed = nnx.Embed(
      config.vocab_size, config.d_model, embedding_init=init, rngs=rngs
    )
    depth_scale = (2 * config.num_layers) ** -0.5

    def stack(block, repeat):
      @nnx.split_rngs(splits=repeat)
      @nnx.vmap(in_axes=0, out_axes=0)
      def make(rngs):
        return blocks.Block(
          block, config.d_model, dtype=dtype, depth_scale=depth_scale, rngs=rngs
        )

      return make(rngs)

    # segments[n][m] is block m of segment n, each parameter with a leading [repeat].
    self.segments = _List(
      [
        _List([stack(block, repeat) for block in blocks_])
        for blocks_, repeat in config.segments
      ]
    )
    self.norm = blocks.norm(config.norm, config.d_model, rngs)
    if not config.tied:
      self.unembed = nnx.Linear(
        config.d_model,
        config.vocab_size,
        use_bias=False,
        dtype=jnp.float32,
        rngs=rngs,
      )

  def __call__(
    self,
    tokens_BS: Array,
    segment_BS: Array | None = None,
    position_BS: Array | None = None,
    *,
    key: Array | None = None,
    train: bool = False,
    forced: Array | None = None,
    look: Callable[[Any], Any] | None = None,
  ) -> tuple[Array, tuple[Info, ...]]:
    """Logits and what each sparse layer reports.

    Args:
      tokens_BS: i32[B,S].
      segment_BS: i32[B,S] document of each token, counted within its row; 0 is
        padding.  None: each row is one document without padding.
      position_BS: i32[B,S] index within the row or document; None: within the row.
      key: for routing noise; layers fold their index, tokens their position.
      train: draws noise, uses training capacities.
      forced: i32[L,B*S,K] recorded expert ids to replay, L sparse layers in order.
      look: what to keep of each sparse layer's `Plan`, in `Info.plan`; None: nothing.

    Returns:
      (f32[B,S,V], Infos): one Info for each sparse block of each segment, in order,
      its arrays stacked over the segment's repeats.

    Raises:
      TypeError, ValueError: an array of another kind, shape or range.
    """
    given: dict[str, Any] = dict(key=key, train=train, forced=forced, look=look)
    x_BSD, infos = self.hidden(tokens_BS, segment_BS, position_BS, **given)
    return self.logits(x_BSD), infos

  @over_mesh.by_xla(over_mesh.of_hidden)
  def hidden(
    self,
    tokens_BS: Array,
    segment_BS: Array | None = None,
    position_BS: Array | None = None,
    *,
    key: Array | None = None,
    train: bool = False,
    forced: Array | None = None,
    look: Callable[[Any], Any] | None = None,
    before: Before | None = None,
  ) -> tuple[Array, tuple[Info, ...]]:
    """What the last block gave, for `logits` or `cross_entropy`, and the Infos.

    Args:
      tokens_BS, segment_BS, position_BS, key, train, forced, look: as for a call.
      before: called with each block's number, parameters and input, and returns the
        last two: for what must happen when their gradients come by.

    Returns:
      (f[B,S,D], Infos) in the dtype of the activations.

    Raises:
      TypeError, ValueError: as a call; or `before` and a segment that is repeated.
    """
    config = self.config
    _checks.call(config, tokens_BS, segment_BS, position_BS, forced)
    if position_BS is None:
      position_BS = jnp.broadcast_to(
        jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape
      )
    context = _context(tokens_BS, segment_BS)
    table_VD = self.embed.embedding[...]
    x_BSD = over_mesh.embedded(table_VD, tokens_BS, config.sharding)
    x_BSD = (self.embed(tokens_BS) if x_BSD is None else x_BSD).astype(config.dtype)
    infos: list[Info] = []
    layer = sparse_layer = 0
    for (configs, repeat), stacked in zip(config.segments, self.segments, strict=True):
      is_sparse = [isinstance(b.ff, MoEConfig) for b in configs]
      replay = None
      if forced is not None and any(is_sparse):
        end = sparse_layer + repeat * sum(is_sparse)
        replay = forced[sparse_layer:end].reshape(
          repeat, sum(is_sparse), *forced.shape[1:]
        )
        sparse_layer = end
      graphs, parameters = zip(*(nnx.split(block) for block in stacked), strict=True)

      def body(x_BSD, scanned, graphs=graphs, is_sparse=is_sparse, configs=configs):
        parameters, first_layer, replay = scanned
        found: list[Info] = []
        for n, (graph, parameter) in enumerate(zip(graphs, parameters, strict=True)):
          block = nnx.merge(graph, parameter)
          index = first_layer + n
          ids = replay[len(found)] if is_sparse[n] and replay is not None else None
          x_BSD, info = block(
            x_BSD,
            position_BS,
            segment_BS,
            dataclasses.replace(context, layer=index),
            key=key,  # the layer folds its index
            train=train,
            forced=ids,
            with_plan=look is not None,
          )
          if info is not None and look is not None:
            plan = over_mesh.whole_plan(info.plan, tokens_BS.shape, configs[n].ff)
            info = dataclasses.replace(info, plan=look(plan))
          x_BSD = over_mesh.activations(x_BSD, config.sharding)
          found += [info] if info is not None else []
        return x_BSD, tuple(found)

      first_layers = layer + len(configs) * jnp.arange(repeat, dtype=jnp.int32)
      scanned = parameters, first_layers, replay
      body = _remembering(body, config.remat)
      if repeat > 1:
        _checks.not_repeated(before, repeat)
        x_BSD, found = jax.lax.scan(body, x_BSD, scanned)
      else:
        # Reshaped rather than indexed: gradients then come back without a copy.
        parameters, *rest = jax.tree.map(lambda x: x.reshape(x.shape[1:]), scanned)
        if before is not None:
          parameters, x_BSD = before(layer, parameters, x_BSD)
        x_BSD, found = body(x_BSD, (parameters, *rest))
        found = jax.tree.map(lambda x: x[None], found)
      infos += found
      layer += len(configs) * repeat
    return x_BSD, tuple(infos)

  def update(self, infos: Sequence[Info]) -> None:
    """Writes the balance state that a call reported; after the optimizer step."""
    _checks.update(self.config, infos)
    sparse = [
      stacked[n]
      for (configs, _), stacked in zip(self.config.segments, self.segments, strict=True)
      for n, block in enumerate(configs)
      if isinstance(block.ff, MoEConfig)
    ]
    for block, info in zip(sparse, infos, strict=True):
      block.moe.update(info)

  @over_mesh.by_xla(over_mesh.of_loss)
  def cross_entropy(
    self,
    x_BSD: Array,
    target_BS: Array,
    weight_BS: Array,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
  ) -> tuple[Array, Array]:
    """The loss of what the last block gave; no array is `[B,S,V]`.

    Args:
      x_BSD: of `hidden`.
      target_BS: i32[B,S] the token that comes next.
      weight_BS: f32[B,S] of each token in the sum; where it is zero nothing counts.
      z_loss, chunk: see `jmoe.models.cross_entropy`.

    Returns:
      (f32[] weighted sum, f32[B,S] nats, zero where they do not count).
    """
    x_BSD = blocks.normed(self.norm, x_BSD)
    if self.config.tied:
      matrix_DV = self.embed.embedding[...].T
    else:
      matrix_DV = self.unembed.kernel[...]
    keywords: dict[str, Any] = dict(z_loss=z_loss, chunk=chunk)
    given = x_BSD, matrix_DV, target_BS, weight_BS
    found = over_mesh.loss(*given, self.config.sharding, **keywords)
    if found is not None:
      return found
    x_TD = x_BSD.reshape(-1, self.config.d_model)
    each = target_BS.reshape(-1), weight_BS.reshape(-1)
    loss, nats_T = cross_entropy(x_TD, matrix_DV, *each, **keywords)
    return loss, nats_T.reshape(target_BS.shape)

  @over_mesh.by_xla(over_mesh.of_logits)
  def logits(self, x_BSD: Array) -> Array:
    """f32[B,S,V] of what the last block gave."""
    x_BSD = blocks.normed(self.norm, x_BSD)
    # In float32 whatever the activations are: jax 0.7 on a CPU cannot multiply bfloat16
    # into float32, and accelerators take no more passes than for bfloat16 by default.
    x_BSD = x_BSD.astype(jnp.float32)
    if self.config.tied:
      embedding_VD = self.embed.embedding[...].astype(jnp.float32)
      return jnp.einsum("bsd,vd->bsv", x_BSD, embedding_VD)
    return self.unembed(x_BSD)


def _remembering(body: Callable[..., Any], remat: bool | tuple[str, ...]) -> Any:
  """A block that keeps for its gradient what `ModelConfig.remat` says."""
  if isinstance(remat, tuple):
    return jax.checkpoint(body, policy=keeping.policy(remat))
  return jax.checkpoint(body) if remat else body


def _context(tokens_BS: Array, segment_BS: Array | None) -> Context:
  """What routers may ask about each token; the layer makes segments unique."""
  batch, seq = tokens_BS.shape
  return Context(
    valid=None if segment_BS is None else segment_BS > 0,
    segment=jnp.ones_like(tokens_BS) if segment_BS is None else segment_BS,
    position=jnp.arange(batch * seq, dtype=jnp.int32).reshape(batch, seq),
    token_id=tokens_BS,
    num_rows=batch,  # equal blocks, so routing groups may be rows
  )
