"""The released layout of EMO: `config.json` and tensors of `EmoForCausalLM`, both ways.

Linear layers lie there as `[out,in]`; a shared expert is the last of a layer's experts,
its router row unused, for its softmax over one logit is one.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jmoe import restrict
from jmoe.assign import renormalise
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.presets import emo
from jmoe.surgery.frame import Block, Model, blocks, rebuilt
from jmoe.use import shown, use

_LINEAR = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_NORMS = {
  "attention_norm": "pre_attention_layernorm",
  "ff_norm": "pre_feedforward_layernorm",
}
_EXPERT = {"gate_EDF": "gate_proj", "up_EDF": "up_proj", "down_EFD": "down_proj"}
_DENSE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_OF_TRAINING = {"moe.state.counted", "moe.state.batches"}
# Where no choice is dropped these are one, `norm_topk_prob`.
_NORMALISING = ("before_dropping", "after_dropping", "over_chosen")
# What the code has beside the released models, and this does not.
_PLAIN = {
  "hidden_act": "silu",
  "attention_bias": False,
  "rope_scaling": None,
  "always_active_experts": None,
  "always_active_experts_per_layer": None,
  "dense_mlp_bias": False,
  "rms_norm_eps": 1e-6,
  "ghost_extend_eval": False,
}


def from_released(
  config: Mapping[str, Any], tensors: Mapping[str, Any], *, dtype: str = "float32"
) -> Model:
  """The model of a released checkpoint, whole or with experts cut away.

  Args:
    config: its config.json.
    tensors: arrays by the names of its files, "model.layers.0.mlp.gate.weight".
    dtype: of activations; parameters keep that of the tensors.

  Raises:
    ValueError: what the model has not: several shared experts (the released code weighs
      them otherwise in training than later), biases, scaled positions; or a tensor that
      is missing, left over, or of another shape.
  """
  for name, plain in _PLAIN.items():
    if (value := config.get(name, plain)) != plain:
      raise ValueError(
        f"convert.emo: {name}={shown(value)} in config.json; only {plain!r} is known."
      )
  left = dict(tensors)
  counts = _counts(config)
  made = [_block(config, n, *each, left) for n, each in enumerate(counts)]
  outside = {
    "embed.embedding": _take(left, "model.embed_tokens.weight"),
    "norm.scale": _take(left, "model.norm.weight"),
  }
  tied = bool(config.get("tie_word_embeddings", False))
  if not tied:
    outside["unembed.kernel"] = _take(left, "lm_head.weight").T
  if left:
    raise ValueError(
      f"convert.emo: tensor {min(left)!r} is not part of this model; {len(left)} are "
      "left over."
    )
  alike = itertools.groupby(made, lambda block: block.config)
  segments = [((kind,), len(list(group))) for kind, group in alike]
  shape = ModelConfig(
    int(config["vocab_size"]),
    int(config["hidden_size"]),
    tuple(segments),
    tied=tied,
    dtype=dtype,
  )
  return rebuilt(Model(shape, outside), made)


def to_released(model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(config.json, tensors) of a model; the inverse of `from_released`.

  Raises:
    ValueError: a layer or a final norm that the released code cannot compute.
  """
  _known({"norm of the model": (model.config.norm, "rms")})
  tensors: dict[str, np.ndarray] = {
    "model.embed_tokens.weight": np.asarray(model.params["embed.embedding"]),
    "model.norm.weight": np.asarray(model.params["norm.scale"]),
  }
  if not model.config.tied:
    tensors["lm_head.weight"] = np.asarray(model.params["unembed.kernel"]).T
  found = blocks(model)
  for n, block in enumerate(found):
    tensors |= _tensors(f"model.layers.{n}.", block)
  configs = [block.config for block in found]
  sparse = [c.ff for c in configs if isinstance(c.ff, MoEConfig)]
  dense = {c.ff.d_ff for c in configs if isinstance(c.ff, Dense)}
  attention = _one({c.attention for c in configs}, "attention")
  shared = _one({ff.shared is not None for ff in sparse}, "shared")
  routed = [ff.num_experts for ff in sparse]
  each = [
    c.ff.num_experts + shared if isinstance(c.ff, MoEConfig) else 0 for c in configs
  ]
  k = max(ff.k or 0 for ff in sparse)
  if any(ff.k != k for ff in sparse):
    raise ValueError(
      f"convert.emo: k={[ff.k for ff in sparse]} differs from layer to layer; the "
      "released code has one for all, so keep as many experts in each."
    )
  rules = {ff.renormalise.name in _NORMALISING for ff in sparse}
  normalised = _one(rules, "norm_topk_prob")
  if normalised:
    _renormalises(shared)
  own_width = {} if attention.head_dim is None else {"head_dim": attention.head_dim}
  return {
    "architectures": ["EmoForCausalLM"],
    "model_type": "emo",
    "vocab_size": model.config.vocab_size,
    "hidden_size": model.config.d_model,
    "intermediate_size": _one({ff.experts.get("d_ff") for ff in sparse}, "d_ff"),
    "dense_intermediate_size": _one(dense, "Dense.d_ff") if dense else None,
    "num_hidden_layers": len(configs),
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.num_kv_heads or attention.num_heads,
    "rope_theta": attention.rope_theta,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": model.config.tied,
    "num_experts": max(routed) + shared,
    "num_shared_experts": int(shared),
    "num_experts_per_tok": k + shared,
    "num_experts_per_layer": each if len(set(each)) > 1 else None,
    "norm_topk_prob": normalised,
    **own_width,
  }, tensors


def _counts(config: Mapping[str, Any]) -> list[tuple[int, int]]:
  """(experts, shared ones among them) of each layer; (0, 0): a dense one."""
  layers, shared = int(config["num_hidden_layers"]), config.get("num_shared_experts", 0)
  each = config.get("num_experts_per_layer") or [config["num_experts"]] * layers
  if len(each) != layers:
    raise ValueError(
      f"convert.emo: num_experts_per_layer={each} of num_hidden_layers={layers} in "
      "config.json; give one a layer."
    )
  some = config.get("num_shared_experts_per_layer") or [min(shared, n) for n in each]
  for n, number in enumerate(some):
    if number not in (0, 1):
      raise ValueError(
        f"convert.emo: layer {n} has num_shared_experts={number}; 0 or 1 is known."
      )
  return list(zip(each, some, strict=True))


def _block(config: Mapping[str, Any], n: int, experts: int, shared: int, left) -> Block:
  """Layer n, whose tensors are taken out of those left."""
  at = f"model.layers.{n}."
  d, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
  attention = Attention(
    num_heads=heads,
    num_kv_heads=config.get("num_key_value_heads"),
    head_dim=config.get("head_dim"),
    rope_theta=float(config.get("rope_theta", 5e5)),
  )
  params = {
    f"attention.{own}.kernel": _take(left, f"{at}self_attn.{name}.weight").T
    for own, name in _LINEAR.items()
  }
  for own, name in _NORMS.items():
    params[f"{own}.scale"] = _take(left, f"{at}{name}.weight")
  if not experts:
    ff: Any = Dense(int(config["dense_intermediate_size"]))
    for own, name in _DENSE.items():
      params[f"ff.{own}.kernel"] = _take(left, f"{at}mlp.{name}.weight").T
    return Block(BlockConfig(attention, ff), params, {})
  routed = experts - shared
  k = min(int(config["num_experts_per_tok"]) - shared, routed)
  width = int(config["intermediate_size"])
  ff = emo.layer(d_model=d, d_ff=width, num_experts=routed, k=k)
  changed: dict[str, Any] = {} if shared else {"shared": None}
  if config.get("norm_topk_prob", False):
    _renormalises(bool(shared))
    changed["renormalise"] = use(renormalise.before_dropping)
  gate_ED = _take(left, f"{at}mlp.gate.weight", (experts, d))
  params["moe.gate.kernel_DE"] = gate_ED[:routed].T
  for own, name in _EXPERT.items():
    each = [_take(left, f"{at}mlp.experts.{e}.{name}.weight").T for e in range(experts)]
    params[f"moe.experts.{own}"] = np.stack(each[:routed])
    if shared:
      params[f"moe.shared.{own}"] = np.stack(each[routed:])
  return Block(BlockConfig(attention, dataclasses.replace(ff, **changed)), params, {})


def _tensors(at: str, block: Block) -> dict[str, np.ndarray]:
  """The tensors of one layer."""
  _check(block)
  ff = block.config.ff
  params = {name: np.asarray(x) for name, x in block.params.items()}
  found = {
    f"{at}self_attn.{name}.weight": params[f"attention.{own}.kernel"].T
    for own, name in _LINEAR.items()
  }
  for own, name in _NORMS.items():
    found[f"{at}{name}.weight"] = params[f"{own}.scale"]
  if not block.sparse:
    for own, name in _DENSE.items():
      found[f"{at}mlp.{name}.weight"] = params[f"ff.{own}.kernel"].T
    return found
  gate_ED = params["moe.gate.kernel_DE"].T
  if isinstance(ff, MoEConfig) and ff.shared is not None:
    gate_ED = np.concatenate([gate_ED, np.zeros_like(gate_ED[:1])])
  found[f"{at}mlp.gate.weight"] = gate_ED
  for own, name in _EXPERT.items():
    each = list(params[f"moe.experts.{own}"])
    each += list(params.get(f"moe.shared.{own}", ()))
    for e, matrix in enumerate(each):
      found[f"{at}mlp.experts.{e}.{name}.weight"] = matrix.T
  return found


def _check(block: Block) -> None:
  """Raises unless the released code computes this layer."""
  config, ff = block.config, block.config.ff
  facts: dict[str, tuple[Any, Any]] = {
    "norm": (config.norm, "rms"),
    "attention.causal": (config.attention.causal, True),
    "attention.qk_norm": (config.attention.qk_norm, None),
  }
  if isinstance(ff, Dense):
    facts |= {"gated": (ff.gated, True), "activation": (ff.activation, jax.nn.silu)}
  else:
    plain = emo.layer(d_model=ff.d_model, d_ff=1, num_experts=ff.num_experts, k=1)
    for field in ("gate", "score", "router", "experts", "join"):
      facts[field] = getattr(ff, field).name, getattr(plain, field).name
    # The pool of training; outside it there is none, as in the released code.
    pools = [each for each in ff.restrict if each.function is restrict.document_pool]
    pools = tuple(pool for pool in pools[:1] if pool.get("evaluation") is None)
    rule = ff.renormalise.name
    facts |= {
      "restrict": (ff.restrict, pools),
      "renormalise": (rule, rule if rule in _NORMALISING else "never"),
      "activation": (ff.experts.get("activation"), jax.nn.silu),
      "scale": (ff.scale, "output"),
      "router.scale": (ff.router.get("scale"), 1.0),
      "capacity": (ff.capacity, None),
      "max_rows": (ff.max_rows, None),
      "aggregate": (ff.aggregate, None),
      "shared": (ff.shared in (None, ff.experts), True),
      "state": (sorted(set(block.state) - _OF_TRAINING), []),
    }
  bias = [name for name in block.params if "bias" in name]
  _known(facts | {"biases": (bias, [])})


def _known(facts: Mapping[str, tuple[Any, Any]]) -> None:
  """Raises unless each is (own, known) of equal values."""
  for field, (own, known) in facts.items():
    if own != known:
      raise ValueError(
        f"convert.emo: {field}={shown(own)}; the released code knows {shown(known)} "
        "alone."
      )


def _renormalises(shared: bool) -> None:
  if shared:
    raise ValueError(
      "convert.emo: norm_topk_prob=True beside a shared expert; the released code "
      "refuses to run it, so leave out one of the two."
    )


def _take(left: dict[str, Any], name: str, shape: Sequence[int] | None = None) -> Any:
  """A tensor, no longer left."""
  if name not in left:
    raise ValueError(
      f"convert.emo: tensor {name!r} is missing; give all files of the checkpoint."
    )
  found = left.pop(name)
  if shape is not None and tuple(found.shape) != tuple(shape):
    raise ValueError(
      f"convert.emo: tensor {name!r} has shape {tuple(found.shape)}; config.json says "
      f"{tuple(shape)}."
    )
  return found


def _one(values: set[Any], what: str) -> Any:
  if len(values) != 1:
    raise ValueError(
      f"convert.emo: {what} differs from layer to layer ({shown(values)}); the "
      "released code has one for all."
    )
  return next(iter(values))
