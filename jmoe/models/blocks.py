"""The parts of a transformer block; the sparse feed-forward is `jmoe.nnx.MoE`.

Between the embedding and the logits of `decoder`.  H query heads, N key and value
heads, d width of a head; the other letters are those of `jmoe.types`.
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jmoe import checks, config as configs
from jmoe.keeping import named
from jmoe.models.attention import attention
from jmoe.nnx import MoE
from jmoe.types import Context, Info


class SelfAttention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), rotary positions.

  Args:
    config: heads and widths.
    d_model: width of the activations.
    dtype: of the activations; parameters are float32.
    depth_scale: multiplies the initial output projection (GPT-2: 1/sqrt(2 * layers)).
    rngs: for the initial parameters.
  """

  def __init__(
    self, config: configs.Attention, d_model: int, *, dtype, depth_scale, rngs
  ):
    self.config = config
    self.head_dim = config.head_dim or d_model // config.num_heads
    self.num_kv_heads = config.num_kv_heads or config.num_heads
    width, kv_width = (n * self.head_dim for n in (config.num_heads, self.num_kv_heads))
    self.query = _linear(d_model, width, dtype, rngs)
    self.key = _linear(d_model, kv_width, dtype, rngs)
    self.value = _linear(d_model, kv_width, dtype, rngs)
    self.out = _linear(width, d_model, dtype, rngs, scale=depth_scale)
    if config.qk_norm is not None:
      each = config.qk_norm == "head"
      self.query_norm = norm("rms", self.head_dim if each else width, rngs)
      self.key_norm = norm("rms", self.head_dim if each else kv_width, rngs)

  def __call__(self, x_BSD: Array, position_BS: Array, segment_BS=None) -> Array:
    """f[B,S,D]; tokens see earlier tokens (if causal) of their own segment."""
    y_BSHd = attention(
      *self.project(x_BSD, position_BS),
      segment_BS,
      is_causal=self.config.causal,
      implementation=self.config.implementation,
    )
    return self.out(named(y_BSHd, "attention").reshape(*x_BSD.shape[:2], -1))

  def project(self, x_BSD: Array, position_BS: Array) -> tuple[Array, Array, Array]:
    """(queries f[B,S,H,d], keys f[B,S,N,d], values f[B,S,N,d]), turned by position."""
    batch, seq, _ = x_BSD.shape
    theta = self.config.rope_theta
    linears = self.query, self.key, self.value
    q_BSF, k_BSF, v_BSF = named([f(x_BSD) for f in linears], "projected")
    if self.config.qk_norm == "all":
      q_BSF, k_BSF = normed(self.query_norm, q_BSF), normed(self.key_norm, k_BSF)
    q_BSHd = q_BSF.reshape(batch, seq, -1, self.head_dim)
    k_BSNd = k_BSF.reshape(batch, seq, -1, self.head_dim)
    v_BSNd = v_BSF.reshape(batch, seq, -1, self.head_dim)
    if self.config.qk_norm == "head":
      q_BSHd, k_BSNd = normed(self.query_norm, q_BSHd), normed(self.key_norm, k_BSNd)
    q_BSHd = rotary(q_BSHd, position_BS, theta=theta)
    return q_BSHd, rotary(k_BSNd, position_BS, theta=theta), v_BSNd

  def attend(self, q_BSHd: Array, k_BMNd: Array, v_BMNd: Array, mask: Array) -> Array:
    """f[B,S,D]; `mask` is bool[B,1,S,M], true where query s may see key m."""
    # jax's own code mixes bfloat16 and float32, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
      y_BSHd = jax.nn.dot_product_attention(q_BSHd, k_BMNd, v_BMNd, mask=mask)
    return self.out(y_BSHd.reshape(*q_BSHd.shape[:2], -1))


class FeedForward(nnx.Module):
  """A dense feed-forward: GLU (Shazeer 2020, arXiv:2002.05202) or two matrices."""

  def __init__(self, config: configs.Dense, d_model: int, *, dtype, depth_scale, rngs):
    self.activation = config.activation
    self.gate = _linear(d_model, config.d_ff, dtype, rngs) if config.gated else None
    self.up = _linear(d_model, config.d_ff, dtype, rngs)
    self.down = _linear(config.d_ff, d_model, dtype, rngs, scale=depth_scale)

  def __call__(self, x_BSD: Array) -> Array:
    """f[B,S,D]."""
    up_BSF = named(self.up(x_BSD), "hidden")
    if self.gate is None:
      return self.down(self.activation(up_BSF))
    return self.down(self.activation(named(self.gate(x_BSD), "hidden")) * up_BSF)


class Block(nnx.Module):
  """Attention and a dense or sparse feed-forward, each behind a norm, each added."""

  def __init__(self, config: configs.BlockConfig, d_model, *, dtype, depth_scale, rngs):
    kwargs = dict(dtype=dtype, depth_scale=depth_scale, rngs=rngs)
    self.attention_norm = norm(config.norm, d_model, rngs)
    self.attention = SelfAttention(config.attention, d_model, **kwargs)
    self.ff_norm = norm(config.norm, d_model, rngs)
    self.sparse = isinstance(config.ff, configs.MoEConfig)
    if isinstance(config.ff, configs.MoEConfig):
      self.moe = MoE(config.ff, rngs=rngs)
      self.skips = checks.owns_skip(config.ff)  # its aggregation adds x
      nnx.update(self.moe, _outputs_scaled(nnx.state(self.moe, nnx.Param), depth_scale))
    else:
      self.ff = FeedForward(config.ff, d_model, **kwargs)

  def __call__(
    self,
    x_BSD: Array,
    position_BS: Array,
    segment_BS: Array | None,
    context: Context,
    *,
    key: Array | None,
    train: bool,
    forced: Array | None,
    with_plan: bool = False,
  ) -> tuple[Array, Info | None]:
    """(f[B,S,D], Info of the sparse layer or None)."""
    h_BSD = normed(self.attention_norm, x_BSD)
    x_BSD += self.attention(h_BSD, position_BS, segment_BS)
    x_BSD = named(x_BSD, "residual")
    return self.feed(
      x_BSD, context, key=key, train=train, forced=forced, with_plan=with_plan
    )

  def feed(
    self,
    x_BSD: Array,
    context: Context,
    *,
    key: Array | None = None,
    train: bool = False,
    forced: Array | None = None,
    with_plan: bool = False,
  ) -> tuple[Array, Info | None]:
    """The second half: (f[B,S,D] with the feed-forward added, Info or None)."""
    h_BSD = normed(self.ff_norm, x_BSD)
    if not self.sparse:
      return x_BSD + self.ff(h_BSD), None
    y_BSD, info = self.moe(
      h_BSD,
      context=context,
      key=key,
      train=train,
      residual=x_BSD if self.skips else None,
      forced=forced,
      with_plan=with_plan,
    )
    return y_BSD if self.skips else x_BSD + y_BSD, info


def _outputs_scaled(params, scale: float):
  """Experts' output matrices start as small as those of a dense feed-forward."""

  def scaled(path, leaf):
    output = "down_EFD" in jax.tree_util.keystr(path)
    return leaf * jnp.asarray(scale, leaf.dtype) if output else leaf

  return jax.tree_util.tree_map_with_path(scaled, params)


def rotary(x_BSHd: Array, position_BS: Array, *, theta: float) -> Array:
  """Heads turned by their position (Su et al. 2021, arXiv:2104.09864, equation 34).

  Halves of a head are paired, as in GPT-NeoX, not neighbours, as in the paper: the
  same up to a permutation of the width.

  Args:
    x_BSHd: f[B,S,H,d] queries or keys; d is even.
    position_BS: i32[B,S] token index within its row or document.
    theta: base of the wavelengths.

  Returns:
    f[B,S,H,d] in the dtype of `x_BSHd`; angles are float32.
  """
  half = x_BSHd.shape[-1] // 2
  rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BS1d = (position_BS.astype(jnp.float32)[..., None] * rate)[:, :, None, :]
  sin, cos = jnp.sin(angle_BS1d), jnp.cos(angle_BS1d)
  a, b = jnp.split(x_BSHd.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BSHd.dtype)


def norm(kind: str, d_model: int, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
  """RMSNorm ("rms") or LayerNorm ("layer"); call it through `normed`."""
  cls = {"rms": nnx.RMSNorm, "layer": nnx.LayerNorm}[kind]
  return cls(d_model, rngs=rngs)


def normed(norm: nnx.RMSNorm | nnx.LayerNorm, x_BSD: Array) -> Array:
  """A norm in float32 (flax refuses bfloat16 under strict promotion), cast back."""
  return norm(x_BSD.astype(jnp.float32)).astype(x_BSD.dtype)


def _linear(d_in: int, d_out: int, dtype, rngs, *, scale: float = 1.0) -> nnx.Linear:
  init = functools.partial(_kernel, scale=scale)
  return nnx.Linear(
    d_in, d_out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
  )


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def _kernel(key, shape, dtype=jnp.float32, *, scale: float) -> Array:
  """f[in,out] of variance scale^2/in; jitted, or building a model takes seconds."""
  return nnx.initializers.lecun_normal()(key, shape, dtype) * jnp.asarray(scale, dtype)
