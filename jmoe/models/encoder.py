"""An encoder as BERT has it: norms after each sum, learned positions, biases.

A model of its own beside `decoder`, whose layers may each have another feed-forward,
dense or sparse; they are no loop, since few are sparse.  Letters are those of `blocks`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jmoe import checks
from jmoe.config import Dense, MoEConfig
from jmoe.models.attention import attention
from jmoe.models.blocks import normed
from jmoe.nnx import MoE, check_rngs
from jmoe.types import Context, Info
from jmoe.use import shown

_List = getattr(nnx, "List", list)  # flax before 0.12 has plain lists


def exact_gelu(x: Array) -> Array:
  """`x Phi(x)`; jax's `gelu` is the approximation by tanh unless it is told."""
  return jax.nn.gelu(x, approximate=False)


@checks.named
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """An encoder.

  Raises:
    ValueError: no layers, heads that do not divide the width, or a feed-forward of
      another kind or width.
  """

  vocab_size: int
  d_model: int
  num_heads: int
  feed_forwards: tuple[Dense | MoEConfig, ...]  # of each layer; two matrices if dense
  max_positions: int = 512
  num_types: int = 2
  norm_eps: float = 1e-12
  dtype: str = "float32"  # of activations; parameters are float32

  def __post_init__(self):
    for name in ("vocab_size", "d_model", "num_heads", "max_positions", "num_types"):
      checks.positive(name, getattr(self, name))
    if self.d_model % self.num_heads:
      raise ValueError(
        f"EncoderConfig: num_heads={self.num_heads} does not divide "
        f"d_model={self.d_model}; give one that does."
      )
    if not self.feed_forwards:
      raise ValueError("EncoderConfig: feed_forwards=() is no layer; give one a layer.")
    for ff in self.feed_forwards:
      sparse = isinstance(ff, MoEConfig) and ff.d_model == self.d_model
      if not sparse and not (isinstance(ff, Dense) and not ff.gated):
        raise ValueError(
          f"EncoderConfig: feed_forwards has {shown(ff)}; give Dense(d_ff, "
          f"gated=False), or a MoEConfig of d_model={self.d_model}."
        )


class EncoderLayer(nnx.Module):
  """Attention and a feed-forward, each added to its input and normed after."""

  def __init__(self, config: EncoderConfig, ff: Dense | MoEConfig, *, rngs: nnx.Rngs):
    d, dtype = config.d_model, jnp.dtype(config.dtype)
    self.num_heads = config.num_heads
    self.query, self.key, self.value, self.out = (
      _linear(d, d, dtype, rngs) for _ in range(4)
    )
    self.attention_norm = _norm(config, rngs)
    if isinstance(ff, MoEConfig):
      self.moe = MoE(ff, rngs=rngs)
      # After the experts' sum, and nobody's: so groups of one feed-forward stay exact.
      self.down_bias = nnx.Param(jnp.zeros(d))
    else:
      self.activation = ff.activation
      self.up = _linear(d, ff.d_ff, dtype, rngs)
      self.down = _linear(ff.d_ff, d, dtype, rngs)
    self.ff_norm = _norm(config, rngs)

  def __call__(
    self, x_BSD: Array, valid_BS: Array, *, key: Array | None, train: bool, layer: int
  ) -> tuple[Array, Info | None]:
    """(f[B,S,D], Info of a sparse feed-forward or None)."""
    x_BSD = self.attend(x_BSD, valid_BS)
    return self.feed(x_BSD, valid_BS, key=key, train=train, layer=layer)

  def attend(self, x_BSD: Array, valid_BS: Array) -> Array:
    """f[B,S,D], the first half: what the feed-forward is given."""
    heads = (*x_BSD.shape[:2], self.num_heads, -1)
    q, k, v = (f(x_BSD).reshape(heads) for f in (self.query, self.key, self.value))
    y_BSHd = attention(q, k, v, valid_BS.astype(jnp.int32), is_causal=False)
    y_BSD = self.out(y_BSHd.reshape(x_BSD.shape))
    return normed(self.attention_norm, x_BSD + y_BSD)

  def feed(
    self, x_BSD: Array, valid_BS: Array, *, key: Array | None, train: bool, layer: int
  ) -> tuple[Array, Info | None]:
    """The second half."""
    info = None
    if hasattr(self, "moe"):
      context = Context(valid=valid_BS, layer=jnp.asarray(layer, jnp.int32))
      y_BSD, info = self.moe(x_BSD, context=context, key=key, train=train)
      y_BSD += self.down_bias[...].astype(y_BSD.dtype)
    else:
      y_BSD = self.down(self.activation(self.up(x_BSD)))
    return normed(self.ff_norm, x_BSD + y_BSD), info


class Encoder(nnx.Module):
  """Activations of tokens that see each other (Devlin et al. 2019, arXiv:1810.04805).

  Args:
    config: the model.
    rngs: for the initial parameters.
  """

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    check_rngs("Encoder", rngs)
    self.config = config
    init = nnx.initializers.normal(0.02)

    def table(size: int) -> nnx.Embed:
      return nnx.Embed(size, config.d_model, embedding_init=init, rngs=rngs)

    self.words = table(config.vocab_size)
    self.positions = table(config.max_positions)
    self.types = table(config.num_types)
    self.embed_norm = _norm(config, rngs)
    self.layers = _List(
      [EncoderLayer(config, ff, rngs=rngs) for ff in config.feed_forwards]
    )

  def __call__(
    self,
    tokens_BS: Array,
    valid_BS: Array | None = None,
    type_BS: Array | None = None,
    *,
    key: Array | None = None,
    train: bool = False,
  ) -> tuple[Array, tuple[Info, ...]]:
    """Activations, and what each sparse layer reports.

    Args:
      tokens_BS: i32[B,S].
      valid_BS: bool[B,S] False for padding; None: there is none.
      type_BS: i32[B,S] first or second text; None: all the first.
      key: for noise of sparse layers.
      train: as for `jmoe.moe`.

    Returns:
      (f[B,S,D] in the config's dtype, Infos in order of depth).

    Raises:
      ValueError: more tokens than positions.
    """
    if valid_BS is None:
      valid_BS = jnp.ones(tokens_BS.shape, bool)
    x_BSD = self.embedded(tokens_BS, type_BS)
    infos = []
    for n, layer in enumerate(self.layers):
      x_BSD, info = layer(x_BSD, valid_BS, key=key, train=train, layer=n)
      infos += [] if info is None else [info]
    return x_BSD, tuple(infos)

  def embedded(self, tokens_BS: Array, type_BS: Array | None = None) -> Array:
    """f[B,S,D] that the first layer is given; arguments are those of a call."""
    S = tokens_BS.shape[1]
    if self.config.max_positions < S:
      raise ValueError(
        f"Encoder: tokens_BS has {S} tokens a row, max_positions="
        f"{self.config.max_positions}; give shorter rows."
      )
    x_BSD = self.words(tokens_BS) + self.positions(jnp.arange(S, dtype=jnp.int32))
    kinds_BS = jnp.zeros_like(tokens_BS) if type_BS is None else type_BS
    x_BSD = normed(self.embed_norm, x_BSD + self.types(kinds_BS))
    return x_BSD.astype(self.config.dtype)

  def update(self, infos: Sequence[Info]) -> None:
    """Writes the state that a call in training reported; after the optimizer step."""
    sparse = [layer for layer in self.layers if hasattr(layer, "moe")]
    for layer, info in zip(sparse, infos, strict=True):
      layer.moe.update(info)


def mean_pool(x_BSD: Array, valid_BS: Array) -> Array:
  """f32[B,D]: the mean of a row's tokens that are no padding (at least one)."""
  weight_BS1 = valid_BS[:, :, None].astype(jnp.float32)
  total_BD = jnp.sum(x_BSD.astype(jnp.float32) * weight_BS1, axis=1)
  return total_BD / jnp.maximum(jnp.sum(weight_BS1, axis=1), 1)


def _linear(d_in: int, d_out: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
  init = nnx.initializers.normal(0.02)
  return nnx.Linear(d_in, d_out, dtype=dtype, kernel_init=init, rngs=rngs)


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.d_model, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs
  )
