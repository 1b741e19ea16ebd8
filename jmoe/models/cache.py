"""Decoding one token at a time: the keys and values of what was read are kept.

  cache = empty_cache(config, start_B, size=prompt + new)
  logits_BV, cache = extend(model, prompt_BS, cache)           # the prompts, at once
  logits_BV, cache = extend(model, token_B[:, None], cache)    # and so on

Rows are padded on the LEFT, so that all of them write the same slot and end at the same
one; each has positions of its own, from 0 at its first token.  Letters are those of
`blocks`, and M slots of a row.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.models.blocks import normed
from jmoe.models.decoder import Decoder
from jmoe.types import Context, pytree
from jmoe.use import fact


@pytree
class Cache:
  """What a model keeps of the tokens that it has read."""

  # One of each block of each segment, in order; L repeats of the segment.
  keys: tuple[Array, ...]  # f[L,B,M,N,d], turned by position
  values: tuple[Array, ...]  # f[L,B,M,N,d]
  start_B: Array  # i32[B] slots of padding before a row's first token
  used: Array  # i32[] slots written, the same of all rows

  @property
  def size(self) -> int:
    """Slots of a row."""
    return self.keys[0].shape[2]


def empty_cache(config: ModelConfig, start_B: Array, *, size: int) -> Cache:
  """A cache in which nothing is written, in the dtype of the activations.

  Args:
    config: of the model.
    start_B: i32[B] slots of padding with which each row begins.
    size: M, slots of a row: of padding, prompt and all that follows.

  Raises:
    ValueError: a block sees later tokens, or its experts depend on the tokens beside:
      on a capacity (see `dropless`), or on random numbers.
  """
  keys = []
  for n, (blocks, repeat) in enumerate(config.segments):
    for m, block in enumerate(blocks):
      _check(f"segments[{n}], block {m}", block)
      of = block.attention
      head_dim = of.head_dim or config.d_model // of.num_heads
      shape = (repeat, len(start_B), size, of.num_kv_heads or of.num_heads, head_dim)
      keys.append(jnp.zeros(shape, config.dtype))
  values = [jnp.zeros_like(key) for key in keys]
  return Cache(tuple(keys), tuple(values), start_B, jnp.zeros((), jnp.int32))


def extend(model: Decoder, tokens_BS: Array, cache: Cache) -> tuple[Array, Cache]:
  """Reads S tokens more of each row.

  Args:
    model: the decoder.
    tokens_BS: i32[B,S] for the next S slots; what stands in padding changes nothing.
    cache: with room for them.  How much is used is not known while tracing, so that the
      caller must count: tokens beyond its size overwrite the last ones.

  Returns:
    f32[B,V] logits of the token after the last one, and the cache with these tokens in
    it.  Work is that of S tokens, and attention to M slots.

  Raises:
    ValueError: another number of rows, or more tokens than slots.
  """
  batch, seq = tokens_BS.shape
  if batch != len(cache.start_B) or seq > cache.size:
    raise ValueError(
      f"tokens of shape {tokens_BS.shape} do not fit a cache of {len(cache.start_B)} "
      f"rows and {cache.size} slots; make one with empty_cache(...)."
    )
  slot_S = cache.used + jnp.arange(seq, dtype=jnp.int32)
  slot_M = jnp.arange(cache.size, dtype=jnp.int32)
  start_B1 = cache.start_B[:, None]
  valid_BS = slot_S >= start_B1
  position_BS = jnp.maximum(slot_S - start_B1, 0)
  # Padding sees padding: no row of the mask is empty, so no NaN.
  alike_BSM = valid_BS[:, :, None] == (slot_M >= start_B1)[:, None]
  mask_B1SM = (alike_BSM & (slot_M <= slot_S[:, None]))[:, None]
  context = Context(
    valid=valid_BS,
    segment=valid_BS.astype(jnp.int32),
    token_id=tokens_BS,
    num_rows=batch,
  )
  x_BSD = model.embed(tokens_BS).astype(model.config.dtype)
  layer = first = 0
  kept: list[tuple[Array, Array]] = []
  for (configs, repeat), stacked in zip(
    model.config.segments, model.segments, strict=True
  ):
    graphs, parameters = zip(*(nnx.split(block) for block in stacked), strict=True)

    def body(carry, scanned, graphs=graphs, layer=layer):
      # The cache is carried rather than scanned over, so that one slot of it is written
      # in place; as scanned values all of it would be copied for every token.
      x_BSD, stores = carry
      parameters, turn = scanned
      written = []
      for m, (graph, parameter) in enumerate(zip(graphs, parameters, strict=True)):
        block = nnx.merge(graph, parameter)
        h_BSD = normed(block.attention_norm, x_BSD)
        q_BSHd, *new = block.attention.project(h_BSD, position_BS)
        at = (turn, 0, cache.used, 0, 0)
        store = tuple(
          jax.lax.dynamic_update_slice(old, one[None], at)
          for old, one in zip(stores[m], new, strict=True)
        )
        k_BMNd, v_BMNd = (
          jax.lax.dynamic_index_in_dim(each, turn, keepdims=False) for each in store
        )
        x_BSD += block.attention.attend(q_BSHd, k_BMNd, v_BMNd, mask_B1SM)
        index = layer + turn * len(graphs) + m
        x_BSD, _ = block.feed(x_BSD, dataclasses.replace(context, layer=index))
        written.append(store)
      return (x_BSD, tuple(written)), None

    last = first + len(configs)
    stores = tuple(zip(cache.keys[first:last], cache.values[first:last], strict=True))
    turns = jnp.arange(repeat, dtype=jnp.int32)
    (x_BSD, stores), _ = jax.lax.scan(body, (x_BSD, stores), (parameters, turns))
    kept += stores
    first, layer = last, layer + len(configs) * repeat
  keys, values = zip(*kept, strict=True)
  logits_B1V = model.logits(x_BSD[:, -1:])
  return logits_B1V[:, 0], Cache(keys, values, cache.start_B, cache.used + seq)


def _check(where: str, block: BlockConfig) -> None:
  """Raises unless what a token gives depends on it and on those before it alone."""
  ff: Any = block.ff
  sparse = isinstance(ff, MoEConfig)
  if sparse and fact(ff.router, "causal", True) is False:
    raise ValueError(
      f"{where}: router={ff.router.name} looks at later tokens, which decoding does "
      "not have; train with a token-choice router (routers.top_k)."
    )
  if not block.attention.causal:
    raise ValueError(
      f"{where}: attention.causal=False looks at later tokens, which decoding does "
      "not have; train with Attention(causal=True)."
    )
  if not sparse:
    return
  for name in ("capacity", "max_rows"):
    if (value := getattr(ff, name)) is not None:
      raise ValueError(
        f"{where}: {name}={value!r} drops choices by the other tokens of a call; "
        "decode with the model of jmoe.models.dropless(config), of equal parameters."
      )
  for stage in (ff.router, *ff.restrict):
    ahead = fact(stage, "ahead")
    if ahead is not None and ahead(**stage.kwargs):
      raise ValueError(
        f"{where}: {stage!r} looks at later tokens outside training too, which "
        "decoding does not have; use evaluation=None."
      )
    draws = fact(stage, "random")
    if draws is not None and draws(False, **stage.kwargs):
      raise ValueError(
        f"{where}: {stage!r} draws experts at random outside training too; use "
        "eval_policy='all'."
      )
