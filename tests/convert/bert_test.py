"""BERT's published layout against its mathematics, written out in NumPy."""
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.convert import bert, tensors
from jmoe.models.encoder import mean_pool
from jmoe.surgery import encoders
from tests import _cases
from tests.tolerance import assert_close

V, D, F, HEADS, LAYERS = 11, 8, 12, 2, 2
CONFIG = {
  "model_type": "bert",
  "hidden_act": "gelu",
  "vocab_size": V,
  "hidden_size": D,
  "intermediate_size": F,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": HEADS,
  "max_position_embeddings": 9,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
}


def drawn(seed=0) -> dict[str, np.ndarray]:
  """Tensors of a checkpoint, the pooler's among them."""
  r = np.random.default_rng(seed)

  def array(*shape):
    return r.normal(size=shape).astype(np.float32) / 2

  found = {
    "embeddings.position_ids": np.arange(9)[None],
    "embeddings.word_embeddings.weight": array(V, D),
    "embeddings.position_embeddings.weight": array(9, D),
    "embeddings.token_type_embeddings.weight": array(2, D),
    "pooler.dense.weight": array(D, D),
    "pooler.dense.bias": array(D),
  }
  norms = ["embeddings.LayerNorm"]
  for n in range(LAYERS):
    at = f"encoder.layer.{n}."
    for name in ("self.query", "self.key", "self.value", "output.dense"):
      found[f"{at}attention.{name}.weight"] = array(D, D)
      found[f"{at}attention.{name}.bias"] = array(D)
    found[f"{at}intermediate.dense.weight"] = array(F, D)
    found[f"{at}intermediate.dense.bias"] = array(F)
    found[f"{at}output.dense.weight"] = array(D, F)
    found[f"{at}output.dense.bias"] = array(D)
    norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
  for name in norms:
    found[f"{name}.weight"], found[f"{name}.bias"] = 1 + array(D), array(D)
  return found


def oracle(w, tokens, length, kinds):
  """f64[S,D] of one row whose first `length` tokens are no padding."""

  def norm(x, at):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
    return w[f"{at}.weight"] * x + w[f"{at}.bias"]

  def linear(x, at):
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]

  gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
  x = w["embeddings.word_embeddings.weight"][tokens]
  x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
  x = norm(
    x + w["embeddings.token_type_embeddings.weight"][kinds], "embeddings.LayerNorm"
  )
  head = D // HEADS
  for n in range(LAYERS):
    at = f"encoder.layer.{n}."
    q, k, v = (linear(x, f"{at}attention.self.{m}") for m in ("query", "key", "value"))
    out = np.zeros_like(x)
    for h in range(HEADS):
      own = slice(h * head, (h + 1) * head)
      score = q[:, own] @ k[:length, own].T / np.sqrt(head)
      share = np.exp(score - score.max(-1, keepdims=True))
      out[:, own] = share / share.sum(-1, keepdims=True) @ v[:length, own]
    y = linear(out, f"{at}attention.output.dense")
    x = norm(x + y, f"{at}attention.output.LayerNorm")
    y = linear(gelu(linear(x, f"{at}intermediate.dense")), f"{at}output.dense")
    x = norm(x + y, f"{at}output.LayerNorm")
  return x


TENSORS = drawn()
TOKENS = np.random.default_rng(1).integers(0, V, (2, 7)).astype(np.int32)
LENGTHS = np.array([7, 4])
VALID = np.arange(7) < LENGTHS[:, None]
KINDS = (np.arange(7) > 3).astype(np.int32) * np.ones((2, 1), np.int32)


def run(model):
  module = model.module()
  with _cases.quickly():
    return np.asarray(jax.jit(lambda *x: module(*x)[0])(TOKENS, VALID, KINDS))


def test_activations_are_those_of_the_published_formulas():
  wide = {name: np.asarray(x, np.float64) for name, x in TENSORS.items()}
  older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
  renamed = {}
  for name, x in TENSORS.items():
    for new, old in older.items():
      name = name.replace(new, old)
    renamed[name] = x
  model = bert.from_released(CONFIG, renamed)
  for name, x in bert.from_released(CONFIG, TENSORS).params.items():
    np.testing.assert_array_equal(model.params[name], x, name)
  found = run(model)
  for row, length in enumerate(LENGTHS):
    expected = oracle(wide, TOKENS[row], length, KINDS[row])
    assert_close(found[row, :length], expected[:length].astype(np.float32))
  pooled = mean_pool(jnp.asarray(found), jnp.asarray(VALID))
  assert_close(pooled[1], found[1, :4].mean(0))


def test_all_groups_are_the_dense_encoder_and_join_to_its_bits():
  dense = bert.from_released(CONFIG, TENSORS)
  found = encoders.grouped(dense, num_experts=3, k=3, layers_changed=[1])
  assert_close(run(found.model)[VALID], run(dense)[VALID])
  again = encoders.ungrouped(found)
  assert again.config == dense.config and not again.state
  _, tensors_ = bert.to_released(again)
  for name, array in tensors_.items():
    np.testing.assert_array_equal(array, TENSORS[name], name)


def test_the_layout_survives_the_way_there_and_back():
  config, found = bert.to_released(bert.from_released(CONFIG, TENSORS))
  assert {name: config[name] for name in CONFIG} == CONFIG
  unread = {n for n in TENSORS if n.startswith("pooler") or n.endswith("position_ids")}
  assert set(found) == set(TENSORS) - unread


def test_what_is_not_known_is_refused():
  def refuses(match, tensors=TENSORS, **changed):
    with pytest.raises(ValueError, match=match):
      bert.from_released(CONFIG | changed, tensors)

  refuses("hidden_act='relu'", hidden_act="relu")
  refuses("config.json says", intermediate_size=13)
  refuses("is not part of this model", num_hidden_layers=1)
  refuses("is missing", num_hidden_layers=3)
  refuses("num_heads=3 does not divide", num_attention_heads=3)
  dense = bert.from_released(CONFIG, TENSORS)
  with pytest.raises(ValueError, match=r"layers_changed=\[2\]"):
    encoders.grouped(dense, num_experts=3, k=1, layers_changed=[2])
  found = encoders.grouped(dense, num_experts=3, k=1, layers_changed=[0])
  with pytest.raises(ValueError, match="use surgery.encoders.ungrouped"):
    bert.to_released(found.model)


def written(arrays) -> bytes:
  header, body = {"__metadata__": {"format": "np"}}, b""
  for name, x in arrays.items():
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    data = x.tobytes()
    header[name] = {
      "dtype": kind[x.dtype.name],
      "shape": list(x.shape),
      "data_offsets": [len(body), len(body) + len(data)],
    }
    body += data
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + body


def test_files_of_tensors_are_read(tmp_path):
  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asarray(jnp.ones((4,), jnp.bfloat16)),
    "c": np.array([[1, 2]], np.int64),
    "d": np.float16(3).reshape(()),
  }
  data = written(arrays)
  (tmp_path / "x.safetensors").write_bytes(data)
  for source in (data, tmp_path / "x.safetensors"):
    found = tensors.read(source)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name], array)
  if importlib.util.find_spec("safetensors"):
    from safetensors.numpy import save

    plain = {name: x for name, x in arrays.items() if name != "b"}
    for name, array in tensors.read(save(plain)).items():
      np.testing.assert_array_equal(array, plain[name])
  with pytest.raises(ValueError, match="has not all of 'd'"):
    tensors.read(data[:-1])
  with pytest.raises(ValueError, match="does not begin as"):
    tensors.read(b"PK")
