"""What a `ModelConfig` must fulfil; called when one is built, before any tracing."""
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import jax

from jmoe.keeping import NAMES
from jmoe.parallel.rules import Rules
from jmoe.use import fact, nearest, shown

_NORMS = ("rms", "layer")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def model_config(config: Any) -> None:
  """Raises if a model cannot be built from this configuration.

  Args:
    config: a `ModelConfig`.

  Raises:
    TypeError: a field is not of the kind it should be.
    ValueError: a value is out of range, or two fields do not fit each other.
  """
  _count("ModelConfig: vocab_size", config.vocab_size, least=2)
  _count("ModelConfig: d_model", config.d_model)
  _choice("ModelConfig: norm", config.norm, _NORMS)
  _choice("ModelConfig: dtype", config.dtype, _DTYPES)
  if config.dtype != jax.dtypes.canonicalize_dtype(config.dtype):
    raise ValueError(
      "ModelConfig: dtype='float64' needs jax.config.update('jax_enable_x64', True); "
      "without it activations would be float32, so use 'float32'."
    )
  _flag("ModelConfig: tied", config.tied)
  _remat(config.remat)
  _flag("ModelConfig: future_drops", config.future_drops)
  if config.sharding is not None and not isinstance(config.sharding, Rules):
    raise TypeError(
      f"ModelConfig: sharding={shown(config.sharding)} is no table; use "
      "jmoe.parallel.Rules(...), or None."
    )
  segments = config.segments
  if not isinstance(segments, tuple) or not segments:
    raise TypeError(
      f"ModelConfig: segments={segments!r}; write ((blocks, repeat), ...), with blocks "
      "a tuple of BlockConfig."
    )
  for n, segment in enumerate(segments):
    where = f"ModelConfig: segments[{n}]"
    if not isinstance(segment, tuple) or len(segment) != 2:
      raise TypeError(f"{where}={segment!r} is not a pair (blocks, repeat).")
    blocks, repeat = segment
    if not isinstance(blocks, tuple) or not blocks:
      raise TypeError(
        f"{where}: blocks={blocks!r} is not a tuple of BlockConfig; for one block "
        "write ((block,), repeat)."
      )
    _count(f"{where}: repeat", repeat)
    for m, block in enumerate(blocks):
      _block(f"{where}, block {m}", block, config.d_model)
      if hasattr(block.ff, "num_experts") and block.attention.causal:
        _causal(f"{where}, block {m}", block.ff, config.future_drops)


def _block(where: str, block: Any, d_model: int) -> None:
  if not hasattr(block, "attention") or not hasattr(block, "ff"):
    raise TypeError(f"{where}={block!r} is not a BlockConfig.")
  _choice(f"{where}: norm", block.norm, _NORMS)
  _attention(where, block.attention, d_model)
  if not hasattr(block.ff, "num_experts"):  # a Dense
    if not hasattr(block.ff, "d_ff"):
      raise TypeError(f"{where}: ff={block.ff!r} is neither Dense nor MoEConfig.")
    _count(f"{where}: ff.d_ff", block.ff.d_ff)
    _flag(f"{where}: ff.gated", block.ff.gated)
    if not callable(block.ff.activation):
      raise TypeError(
        f"{where}: ff.activation={block.ff.activation!r} is not a function; pass one, "
        "for instance jax.nn.silu."
      )
    return
  if block.ff.d_model != d_model:
    raise ValueError(
      f"{where}: ff.d_model={block.ff.d_model} in a model of d_model={d_model}; make "
      "them equal."
    )


def _causal(where: str, ff: Any, future_drops: bool) -> None:
  """Raises where a token's outcome depends on later ones."""
  if not fact(ff.router, "causal", True):
    raise ValueError(
      f"{where}: router={ff.router.name} looks at later tokens, in a causal model; use "
      "a token-choice router (routers.top_k), or Attention(causal=False)."
    )
  if future_drops:
    return
  if ff.max_rows is not None and ff.max_rows < 1:
    raise ValueError(
      f"{where}: max_rows={ff.max_rows} lets later tokens decide who is dropped, in a "
      "causal model; use max_rows=None, or ModelConfig(future_drops=True)."
    )
  if ff.capacity is not None and not fact(ff.priority, "causal", True):
    raise ValueError(
      f"{where}: priority={ff.priority.name} lets later tokens decide who is dropped, "
      "in a causal model; use priority.by_choice_rank, capacity=None, or "
      "ModelConfig(future_drops=True)."
    )


def _attention(where: str, attention: Any, d_model: int) -> None:
  if not hasattr(attention, "num_heads"):
    raise TypeError(f"{where}: attention={attention!r} is not an Attention.")
  _flag(f"{where}: attention.causal", attention.causal)
  if attention.implementation not in (None, "xla", "cudnn"):
    raise ValueError(
      f"{where}: attention.implementation={attention.implementation!r}; use None, "
      "'xla' or 'cudnn'."
    )
  if attention.qk_norm not in (None, "all", "head"):
    raise ValueError(
      f"{where}: attention.qk_norm={attention.qk_norm!r}; use None, 'all' or 'head'."
    )
  heads, kv_heads = attention.num_heads, attention.num_kv_heads
  head_dim = attention.head_dim
  _count(f"{where}: attention.num_heads", heads)
  if kv_heads is not None:
    _count(f"{where}: attention.num_kv_heads", kv_heads)
    if heads % kv_heads:
      raise ValueError(
        f"{where}: attention.num_heads={heads} is not divisible by "
        f"num_kv_heads={kv_heads}; use a divisor of num_heads."
      )
  if head_dim is None:
    if d_model % heads:
      raise ValueError(
        f"{where}: d_model={d_model} is not divisible by num_heads={heads}; use a "
        "divisor, or give head_dim."
      )
    head_dim = d_model // heads
  _count(f"{where}: attention.head_dim", head_dim)
  if head_dim % 2:
    raise ValueError(
      f"{where}: head_dim={head_dim} is odd; rotary positions turn pairs, so make it "
      "even."
    )
  theta = attention.rope_theta
  number = isinstance(theta, int | float) and not isinstance(theta, bool)
  if not number or not (math.isfinite(theta) and theta > 0):
    raise ValueError(
      f"{where}: attention.rope_theta={theta!r}; give a positive number, usually 1e4."
    )


def _remat(value: Any) -> None:
  if not isinstance(value, tuple):
    if not isinstance(value, bool):
      raise TypeError(
        f"ModelConfig: remat={shown(value)} is not True or False, nor a tuple of names "
        f"to keep; the names are {', '.join(NAMES)}."
      )
    return
  for name in value:
    _choice("ModelConfig: remat keeps", name, NAMES)


def _count(where: str, value: Any, least: int = 1) -> None:
  if isinstance(value, bool) or not isinstance(value, int):
    raise TypeError(f"{where}={value!r} is not an integer; give one >= {least}.")
  if value < least:
    raise ValueError(f"{where}={value}; give an integer >= {least}.")


def _flag(where: str, value: Any) -> None:
  if not isinstance(value, bool):
    raise TypeError(f"{where}={shown(value)} is not True or False; give one of them.")


def _choice(where: str, value: Any, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(f"{where}={value!r}; {nearest(str(value), known)}")
