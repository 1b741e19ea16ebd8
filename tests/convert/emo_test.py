"""The released layout of EMO against its mathematics, written out in NumPy.

The oracle follows `modeling_emo.py` of the paper's repository step by step: a token at
a time, one expert after the other.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import numpy as np
import pytest

from jmoe import balance, gates, renormalise, restrict, score, surgery, use
from jmoe.convert import emo
from jmoe.experts import glu
from tests import _cases
from tests.surgery import cases
from tests.tolerance import assert_close

V, D, F, HEADS, KV = 11, 8, 6, 4, 2
CONFIG = {
  "vocab_size": V,
  "hidden_size": D,
  "intermediate_size": F,
  "num_hidden_layers": 3,
  "num_attention_heads": HEADS,
  "num_key_value_heads": KV,
  "rope_theta": 500.0,
  "tie_word_embeddings": False,
  "num_experts": 6,
  "num_shared_experts": 1,
  "num_experts_per_tok": 3,
  "num_experts_per_layer": [6, 6, 0],
  "dense_intermediate_size": 5,
  "norm_topk_prob": False,
}


def drawn(config, seed=0) -> dict[str, np.ndarray]:
  """Tensors of a checkpoint."""
  r = np.random.default_rng(seed)

  def array(*shape):
    return r.normal(size=shape).astype(np.float32) / 2

  found = {
    "model.embed_tokens.weight": array(V, D),
    "model.norm.weight": 1 + array(D),
    "lm_head.weight": array(V, D),
  }
  kv = D // HEADS * KV
  for n, experts in enumerate(config["num_experts_per_layer"]):
    at = f"model.layers.{n}."
    for name, out in (("q", D), ("k", kv), ("v", kv), ("o", D)):
      found[f"{at}self_attn.{name}_proj.weight"] = array(out, D)
    for name in ("attention", "feedforward"):
      found[f"{at}pre_{name}_layernorm.weight"] = 1 + array(D)
    if experts:
      found[f"{at}mlp.gate.weight"] = 2 * array(experts, D)
    mlps = [f"experts.{e}." for e in range(experts)] or [""]
    width = F if experts else config["dense_intermediate_size"]
    for mlp in mlps:
      for name in ("gate", "up"):
        found[f"{at}mlp.{mlp}{name}_proj.weight"] = array(width, D)
      found[f"{at}mlp.{mlp}down_proj.weight"] = array(D, width)
  return found


def oracle(config, tensors, tokens):
  """f64[S,V] logits of one row, and the routed experts of each token and layer."""
  w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
  head = D // HEADS

  def norm(x, weight):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

  def mlp(x, at):
    gate = w[f"{at}gate_proj.weight"] @ x
    hidden = gate / (1 + np.exp(-gate)) * (w[f"{at}up_proj.weight"] @ x)
    return w[f"{at}down_proj.weight"] @ hidden

  def turned(x_Hd, position):
    rate = config["rope_theta"] ** (-np.arange(0, head, 2) / head)
    angle = np.tile(position * rate, 2)
    a, b = np.split(x_Hd, 2, axis=-1)
    other = np.concatenate([-b, a], axis=-1)
    return x_Hd * np.cos(angle) + other * np.sin(angle)

  def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()

  S, chosen = len(tokens), []
  x_SD = w["model.embed_tokens.weight"][tokens]
  for n, experts in enumerate(config["num_experts_per_layer"]):
    at = f"model.layers.{n}."
    h_SD = norm(x_SD, w[f"{at}pre_attention_layernorm.weight"])
    q, k, v = (
      (h_SD @ w[f"{at}self_attn.{name}_proj.weight"].T).reshape(S, -1, head)
      for name in "qkv"
    )
    q, k = (np.stack([turned(x[s], s) for s in range(S)]) for x in (q, k))
    out = np.zeros((S, HEADS, head))
    for s in range(S):
      for a in range(HEADS):
        own = a // (HEADS // KV)
        share = softmax(k[: s + 1, own] @ q[s, a] / np.sqrt(head))
        out[s, a] = share @ v[: s + 1, own]
    x_SD = x_SD + out.reshape(S, D) @ w[f"{at}self_attn.o_proj.weight"].T
    h_SD = norm(x_SD, w[f"{at}pre_feedforward_layernorm.weight"])
    chosen.append([])
    for s in range(S):
      if not experts:
        x_SD[s] += mlp(h_SD[s], f"{at}mlp.")
        continue
      logits = w[f"{at}mlp.gate.weight"] @ h_SD[s]
      routed = softmax(logits[:-1])  # the last one is shared
      best = np.argsort(-routed)[: min(config["num_experts_per_tok"], experts) - 1]
      chosen[-1].append(sorted(best.tolist()))
      x_SD[s] += mlp(h_SD[s], f"{at}mlp.experts.{experts - 1}.")
      for e in best:
        x_SD[s] += routed[e] * mlp(h_SD[s], f"{at}mlp.experts.{e}.")
  return norm(x_SD, w["model.norm.weight"]) @ w["lm_head.weight"].T, chosen


TOKENS = np.random.default_rng(1).integers(0, V, 9).astype(np.int32)
TENSORS = drawn(CONFIG)


def compare(model, config, tensors):
  """Logits and routes of the model are the oracle's."""
  expected, chosen = oracle(config, tensors, TOKENS)
  module = model.module()
  look = lambda plan: plan.routing.expert  # noqa: E731
  with _cases.quickly():
    run = jax.jit(lambda tokens: module(tokens, look=look))
    logits, infos = run(TOKENS[None])
  assert_close(np.asarray(logits)[0], expected.astype(np.float32))
  routes = [layer for info in infos for layer in np.asarray(info.plan)]
  own = [each for each in chosen if each]
  assert [np.sort(r.reshape(len(TOKENS), -1)).tolist() for r in routes] == own


def test_logits_and_routes_are_those_of_the_released_code():
  model = emo.from_released(CONFIG, TENSORS)
  assert [repeat for _, repeat in model.config.segments] == [2, 1]
  compare(model, CONFIG, TENSORS)


def test_the_layout_survives_the_way_there_and_back():
  config, tensors = emo.to_released(emo.from_released(CONFIG, TENSORS))
  assert {name: config[name] for name in CONFIG} == CONFIG
  assert set(tensors) == set(TENSORS)
  for name, array in TENSORS.items():
    if name.endswith("mlp.gate.weight"):
      array = np.concatenate([array[:-1], np.zeros((1, D))])  # no one reads this row
    np.testing.assert_array_equal(tensors[name], array, name)


def test_an_extracted_model_is_published_in_the_same_layout():
  model = emo.from_released(CONFIG, TENSORS)
  small = surgery.cut_model(model, [[0, 2, 4], [1, 2]])
  config, tensors = emo.to_released(small)
  assert config["num_experts_per_layer"] == [4, 3, 0]
  compare(small, config, tensors)
  again = emo.from_released(config, tensors)
  assert again.config == small.config


NORMALISING = (
  renormalise.before_dropping,
  renormalise.after_dropping,
  renormalise.over_chosen,
)
POOL = use(restrict.document_pool, least=2)


def test_rules_that_coincide_without_drops_are_published_as_one():
  for rule, expected in ((renormalise.never, False), *((r, True) for r in NORMALISING)):
    ff = cases.layer(shared=None, renormalise=use(rule), restrict=(POOL,))
    config, _ = emo.to_released(cases.model(cases.config(ff)))
    assert config["norm_topk_prob"] is expected


def refuses(match, tensors=TENSORS, **changed):
  with pytest.raises(ValueError, match=match):
    emo.from_released(CONFIG | changed, tensors)


def test_what_is_not_known_is_refused():
  refuses("num_shared_experts=2", num_shared_experts=2)
  refuses("attention_bias=True", attention_bias=True)
  refuses("always_active_experts=", always_active_experts=[0])
  refuses("config.json says", num_experts_per_layer=[7, 6, 0])
  refuses("num_hidden_layers=2", num_hidden_layers=2)
  refuses("left over", tie_word_embeddings=True)
  refuses("rms_norm_eps=1e-05", rms_norm_eps=1e-5)
  refuses("norm_topk_prob=True beside", norm_topk_prob=True)
  without = {k: TENSORS[k] for k in TENSORS if "lm" not in k}
  refuses("'lm_head.weight' is missing", without)
  for field, changed in (
    ("score='sigmoid'", dict(score=use(score.sigmoid))),
    ("state=", dict(balance=use(balance.update))),
    ("shared=False", dict(shared=use(glu, d_ff=7))),
    ("biases=", dict(gate=use(gates.linear, bias=True))),
    ("restrict=.*subset", dict(restrict=(use(restrict.subset, experts=(0, 1)),))),
    ("restrict=.*document", dict(restrict=2 * (POOL,))),
    ("evaluation=3", dict(restrict=(POOL.replace(evaluation=3),))),
    *(("beside a shared", dict(renormalise=use(rule))) for rule in NORMALISING),
  ):
    model = cases.model(cases.config(cases.layer(**changed)))
    with pytest.raises(ValueError, match=field):
      emo.to_released(model)
  few = surgery.cut_model(emo.from_released(CONFIG, TENSORS), [[0, 1], [2]])
  with pytest.raises(ValueError, match=r"k=\[2, 1\] differs"):
    emo.to_released(few)
  whole = emo.from_released(CONFIG, TENSORS)
  layered = dataclasses.replace(whole.config, norm="layer")
  with pytest.raises(ValueError, match="norm of the model='layer'"):
    emo.to_released(whole._replace(config=layered))
