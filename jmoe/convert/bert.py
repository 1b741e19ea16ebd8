"""BERT's published layout as a `surgery.encoders.EncoderModel`, and back.

`config.json` and tensors by name, as `tensors.read` gives them, of BertModel or of a
model with a head (names below "bert."), norms with the names of newer or older files.
The pooler and heads are left out.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any

import numpy as np

from jmoe.config import Dense
from jmoe.models.encoder import EncoderConfig, exact_gelu
from jmoe.surgery.encoders import EncoderModel
from jmoe.use import shown

# What this code computes; another value in config.json is refused.
_PLAIN = {
  "model_type": "bert",
  "hidden_act": "gelu",
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "add_cross_attention": False,
}
_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "max_position_embeddings",
  "type_vocab_size",
  "layer_norm_eps",
)
_TABLES = {
  "words.embedding": "embeddings.word_embeddings.weight",
  "positions.embedding": "embeddings.position_embeddings.weight",
  "types.embedding": "embeddings.token_type_embeddings.weight",
}
_LINEAR = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "out": "attention.output.dense",
  "up": "intermediate.dense",
  "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "ff_norm": "output.LayerNorm"}
_UNREAD = ("pooler.", "cls.", "classifier.", "embeddings.position_ids")


def from_released(
  config: Mapping[str, Any],
  tensors: Mapping[str, Any],
  *,
  dtype: str = "float32",
) -> EncoderModel:
  """The encoder of a published checkpoint; parameters become float32.

  Args:
    config: of config.json.
    tensors: arrays by name, of all files of the checkpoint.
    dtype: of activations.

  Raises:
    ValueError: a setting that this code does not compute, or a tensor that is missing,
      left over, or of another shape.
  """
  for name, plain in _PLAIN.items():
    if (value := config.get(name, plain)) != plain:
      raise ValueError(
        f"convert.bert: {name}={shown(value)} in config.json; only {plain!r} is known."
      )
  if missing := [name for name in _SIZES if name not in config]:
    raise ValueError(
      f"convert.bert: {missing[0]} is missing; give config.json of the checkpoint."
    )
  left = {name.removeprefix("bert."): x for name, x in tensors.items()}
  left = {name: x for name, x in left.items() if not name.startswith(_UNREAD)}
  d, width = int(config["hidden_size"]), int(config["intermediate_size"])
  layers = int(config["num_hidden_layers"])
  made = EncoderConfig(
    vocab_size=int(config["vocab_size"]),
    d_model=d,
    num_heads=int(config["num_attention_heads"]),
    feed_forwards=(Dense(width, gated=False, activation=exact_gelu),) * layers,
    max_positions=int(config["max_position_embeddings"]),
    num_types=int(config["type_vocab_size"]),
    norm_eps=float(config["layer_norm_eps"]),
    dtype=dtype,
  )
  rows = made.vocab_size, made.max_positions, made.num_types
  params = {
    own: _take(left, name, (number, d))
    for (own, name), number in zip(_TABLES.items(), rows, strict=True)
  }
  params |= _norm(left, "embed_norm", "embeddings.LayerNorm", d)
  for n in range(layers):
    at, there = f"layers.{n}.", f"encoder.layer.{n}."
    for own, name in _LINEAR.items():
      out, into = {"up": (width, d), "down": (d, width)}.get(own, (d, d))
      params[f"{at}{own}.kernel"] = _take(left, f"{there}{name}.weight", (out, into)).T
      params[f"{at}{own}.bias"] = _take(left, f"{there}{name}.bias", (out,))
    for own, name in _NORMS.items():
      params |= _norm(left, at + own, there + name, d)
  if left:
    raise ValueError(
      f"convert.bert: tensor {min(left)!r} is not part of this model; {len(left)} are "
      "left over."
    )
  return EncoderModel(made, params)


def to_released(model: EncoderModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(config.json, tensors) of a dense encoder; the inverse of `from_released`.

  Raises:
    ValueError: a layer that BERT cannot compute, as groups that were not joined.
  """
  own, ffs = model.config, set(model.config.feed_forwards)
  ff = next(iter(ffs))
  if len(ffs) > 1 or not isinstance(ff, Dense) or ff.activation is not exact_gelu:
    raise ValueError(
      f"convert.bert: feed_forwards={shown(own.feed_forwards)}; BERT has Dense ones of "
      "one width with exact_gelu; use surgery.encoders.ungrouped first."
    )
  arrays = {name: np.asarray(x) for name, x in model.params.items()}
  tensors = {name: arrays[mine] for mine, name in _TABLES.items()}
  norms = {"embed_norm": "embeddings.LayerNorm"}
  for n in range(len(own.feed_forwards)):
    at, there = f"layers.{n}.", f"encoder.layer.{n}."
    for mine, name in _LINEAR.items():
      tensors[f"{there}{name}.weight"] = arrays[f"{at}{mine}.kernel"].T
      tensors[f"{there}{name}.bias"] = arrays[f"{at}{mine}.bias"]
    norms |= {at + mine: there + name for mine, name in _NORMS.items()}
  for mine, name in norms.items():
    tensors[f"{name}.weight"] = arrays[f"{mine}.scale"]
    tensors[f"{name}.bias"] = arrays[f"{mine}.bias"]
  return {
    "architectures": ["BertModel"],
    **_PLAIN,
    "vocab_size": own.vocab_size,
    "hidden_size": own.d_model,
    "intermediate_size": ff.d_ff,
    "num_hidden_layers": len(own.feed_forwards),
    "num_attention_heads": own.num_heads,
    "max_position_embeddings": own.max_positions,
    "type_vocab_size": own.num_types,
    "layer_norm_eps": own.norm_eps,
  }, tensors


def _norm(left: dict[str, Any], own: str, name: str, d: int) -> dict[str, np.ndarray]:
  # Older files have TensorFlow's names.
  scale, bias = ("gamma", "beta") if f"{name}.gamma" in left else ("weight", "bias")
  return {
    f"{own}.scale": _take(left, f"{name}.{scale}", (d,)),
    f"{own}.bias": _take(left, f"{name}.{bias}", (d,)),
  }


def _take(left: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor, no longer left."""
  if name not in left:
    raise ValueError(
      f"convert.bert: tensor {name!r} is missing; give all files of the checkpoint."
    )
  found = np.asarray(left.pop(name), np.float32)
  if found.shape != shape:
    raise ValueError(
      f"convert.bert: tensor {name!r} has shape {found.shape}; config.json says "
      f"{shape}."
    )
  return found
