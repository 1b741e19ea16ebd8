"""One token at a time gives the logits of the whole text."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import balance, models, presets, restrict, routers, use
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from tests.models.decoder_test import built
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, V = 16, 40
MANY = Attention(num_heads=4)
GROUPED = Attention(num_heads=4, num_kv_heads=2, head_dim=6)
DENSE = BlockConfig(MANY, Dense(d_ff=24))
TOP_2 = BlockConfig(GROUPED, simple(D, 12, num_experts=4, k=2))
FINE = BlockConfig(
  GROUPED,
  simple(
    D,
    8,
    num_experts=8,
    k=3,
    shared_d_ff=8,
    balance=use(balance.update, rate=0.1),
  ),
  norm="layer",
)
HASHED = BlockConfig(
  MANY,
  presets.hash_layers.layer(d_model=D, d_ff=8, vocab_size=V, num_experts=4),
)


def model(*segments, **values) -> ModelConfig:
  return ModelConfig(V, D, segments=segments, remat=False, **values)


CONFIGS = {
  "dense, tied": model(((DENSE,), 2)),
  "grouped heads, top-2, untied": model(((TOP_2,), 2), tied=False),
  "first dense, then two sparse blocks twice": model(
    ((DENSE,), 1), ((HASHED, FINE), 2), norm="layer", tied=False
  ),
}

PROMPT, NEW = 8, 6
LENGTHS = np.array([1, 5, 8])
# Compile time is what these tests cost.
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def texts(lengths=LENGTHS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(i32[B,PROMPT] left-padded with garbage, i32[B] starts)."""
  tokens = np.random.default_rng(seed).integers(0, V, (len(lengths), PROMPT))
  return tokens.astype(np.int32), (PROMPT - lengths).astype(np.int32)


@functools.partial(jit, static_argnames=("graph", "config", "num_new"))
def greedy(graph, state, tokens_BP, start_B, *, config, num_new=NEW):
  """(i32[B,num_new] tokens, f32[B,num_new,V] the logits they are drawn from)."""
  made = nnx.merge(graph, state)
  cache = models.empty_cache(config, start_B, size=PROMPT + num_new)
  logits_BV, cache = models.extend(made, tokens_BP, cache)

  def step(carry, _):
    logits_BV, cache = carry
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return models.extend(made, token_B[:, None], cache), (token_B, logits_BV)

  _, (token_NB, logits_NBV) = jax.lax.scan(step, (logits_BV, cache), length=num_new)
  return token_NB.T, logits_NBV.swapaxes(0, 1)


@functools.partial(jit, static_argnames="graph")
def whole(graph, state, tokens_BS, segment_BS):
  return nnx.merge(graph, state)(tokens_BS, segment_BS)[0]


def read_whole(graph, state, tokens_BP, start_B, new_BN):
  """f32[B,N,V] the same logits from one pass over each text, padded on the right."""
  rows = [np.concatenate([r[s:], n]) for r, s, n in zip(tokens_BP, start_B, new_BN)]
  size = PROMPT + new_BN.shape[1]
  tokens_BS = np.stack([np.pad(row, (0, size - len(row))) for row in rows])
  segment_BS = np.stack([np.arange(size) < len(row) for row in rows]).astype(np.int32)
  logits_BSV = np.asarray(whole(graph, state, tokens_BS, segment_BS))
  last_B = PROMPT - 1 - start_B  # of each prompt
  return np.stack(
    [x[n : n + new_BN.shape[1]] for x, n in zip(logits_BSV, last_B, strict=True)]
  )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_new_token_gets_the_logits_of_the_whole_text(config):
  graph, state = built(config)
  tokens_BP, start_B = texts()
  new_BN, logits_BNV = map(
    np.asarray, greedy(graph, state, tokens_BP, start_B, config=config)
  )
  expected_BNV = read_whole(graph, state, tokens_BP, start_B, new_BN)
  assert_close(logits_BNV, expected_BNV)
  np.testing.assert_array_equal(new_BN, expected_BNV.argmax(-1))
  assert len({*new_BN.ravel().tolist()}) > 1


def test_a_prompt_gives_what_it_gives_alone():
  config = CONFIGS["grouped heads, top-2, untied"]
  graph, state = built(config)
  tokens_BP, start_B = texts()
  together = greedy(graph, state, tokens_BP, start_B, config=config)
  for n in range(len(start_B)):
    one = [x[None] for x in (tokens_BP[n], start_B[n])]
    new_1N, logits_1NV = greedy(graph, state, *one, config=config)
    chex.assert_trees_all_equal(new_1N[0], together[0][n])
    assert_close(logits_1NV[0], together[1][n])


def test_what_padding_holds_changes_nothing():
  config = CONFIGS["grouped heads, top-2, untied"]
  graph, state = built(config)
  tokens_BP, start_B = texts()
  padding_BP = np.arange(PROMPT) < start_B[:, None]
  other_BP = np.where(padding_BP, (tokens_BP + 7) % V, tokens_BP)
  chex.assert_trees_all_equal(
    greedy(graph, state, tokens_BP, start_B, config=config),
    greedy(graph, state, other_BP, start_B, config=config),
  )


def test_a_text_may_be_read_in_parts():
  config = CONFIGS["grouped heads, top-2, untied"]
  graph, state = built(config)
  tokens_BP, start_B = texts()
  _, expected_BNV = greedy(graph, state, tokens_BP, start_B, config=config)
  extend = jit(
    lambda state, tokens, cache: models.extend(nnx.merge(graph, state), tokens, cache)
  )
  cache = models.empty_cache(config, jnp.asarray(start_B), size=PROMPT)
  _, cache = extend(state, tokens_BP[:, :4], cache)
  logits_BV, cache = extend(state, tokens_BP[:, 4:], cache)
  assert int(cache.used) == PROMPT
  assert_close(logits_BV, expected_BNV[:, 0])


def test_bfloat16_activations_give_the_ids_where_logits_differ_by_more_than_rounding():
  config = model(((TOP_2,), 2), norm="layer", dtype="bfloat16")
  graph, state = built(config)
  tokens_BP, start_B = texts()
  new_BN, logits_BNV = map(
    np.asarray, greedy(graph, state, tokens_BP, start_B, config=config)
  )
  expected_BNV = read_whole(graph, state, tokens_BP, start_B, new_BN)
  chex.assert_type(logits_BNV, jnp.float32)
  np.testing.assert_allclose(logits_BNV, expected_BNV, rtol=0.05, atol=0.1)
  second, best = np.moveaxis(np.sort(expected_BNV, axis=-1)[..., -2:], -1, 0)
  clear_BN = best - second > 0.2
  assert clear_BN.mean() > 0.3
  np.testing.assert_array_equal(new_BN[clear_BN], expected_BNV.argmax(-1)[clear_BN])


def test_a_model_with_capacities_decodes_without_them_and_with_its_parameters():
  roomy = dataclasses.replace(
    TOP_2, ff=simple(D, 12, num_experts=4, k=2, capacity_factor=4.0)
  )
  bounded = dataclasses.replace(TOP_2, ff=dataclasses.replace(TOP_2.ff, max_rows=0.5))
  trained = model(((DENSE, roomy), 2), ((bounded,), 1), future_drops=True)
  config = models.dropless(trained)
  assert config == model(((DENSE, TOP_2), 2), ((TOP_2,), 1))
  assert models.dropless(config) == config
  # Nothing is dropped at that factor, so that the trained model says the same.
  (graph, state), config = (
    built(model(((roomy,), 2), tied=False)),
    model(((TOP_2,), 2), tied=False),
  )
  decoding, _ = built(config)
  tokens_BP, start_B = texts()
  new_BN, logits_BNV = map(
    np.asarray, greedy(decoding, state, tokens_BP, start_B, config=config)
  )
  assert_close(logits_BNV, read_whole(graph, state, tokens_BP, start_B, new_BN))


DRAWING = use(routers.top_2, eval_policy="random")
POOLS = use(restrict.document_pool, least=2, evaluation=2)
BLIND = dataclasses.replace(MANY, causal=False)
REFUSED = {
  "capacity": (
    BlockConfig(MANY, simple(D, 12, num_experts=4, capacity_factor=1.25)),
    r"capacity=by_factor\(.* decode with the model of jmoe.models.dropless",
  ),
  "bounded": (
    BlockConfig(MANY, simple(D, 12, num_experts=4, max_rows=0.5)),
    "max_rows=0.5 drops .* jmoe.models.dropless",
  ),
  "expert choice": (
    BlockConfig(BLIND, presets.expert_choice.layer(d_model=D, d_ff=8, num_experts=4)),
    "router=expert_choice looks at later tokens",
  ),
  "soft": (
    BlockConfig(BLIND, presets.soft_moe.layer(d_model=D, d_ff=8, num_experts=4)),
    "router=soft looks at later tokens",
  ),
  "pools": (
    BlockConfig(MANY, dataclasses.replace(TOP_2.ff, restrict=(POOLS,))),
    r"document_pool\(.*\) looks at later tokens outside training too",
  ),
  "not causal": (BlockConfig(BLIND, Dense(8)), "attention.causal=False looks at later"),
  "random": (
    BlockConfig(MANY, dataclasses.replace(TOP_2.ff, router=DRAWING)),
    r"top_2\(eval_policy='random'\) draws experts at random outside training too; use "
    "eval_policy='all'",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused_by_block(case):
  block, said = REFUSED[case]
  config = model(((DENSE,), 1), ((DENSE, block), 2), future_drops=True)
  with pytest.raises(ValueError, match=r"^segments\[1\], block 1: " + said) as error:
    models.empty_cache(config, jnp.zeros(2, jnp.int32), size=4)
  assert "\n" not in str(error.value)


def test_what_is_random_in_training_alone_is_decoded():
  router = use(routers.top_2, policy="random", eval_policy="threshold")
  block = BlockConfig(MANY, dataclasses.replace(TOP_2.ff, router=router))
  cache = models.empty_cache(model(((block,), 2)), jnp.zeros(3, jnp.int32), size=4)
  assert cache.size == 4 and cache.keys[0].shape == (2, 3, 4, 4, 4)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_tokens_that_a_cache_has_no_room_for_are_refused(shape):
  config = CONFIGS["dense, tied"]
  cache = models.empty_cache(config, jnp.zeros(2, jnp.int32), size=4)
  made = nnx.merge(*built(config))
  with pytest.raises(ValueError, match="do not fit a cache of 2 rows and 4 slots"):
    models.extend(made, jnp.zeros(shape, jnp.int32), cache)


def test_a_step_costs_one_token_whatever_was_read_before():
  config = CONFIGS["dense, tied"]
  graph, state = built(config)

  def flops(function, *arguments) -> float:
    return jax.jit(function).lower(state, *arguments).cost_analysis()["flops"]

  def step(state, token_B1, cache):
    return models.extend(nnx.merge(graph, state), token_B1, cache)

  def costs(size: int) -> tuple[float, float]:
    cache = models.empty_cache(config, jnp.zeros(1, jnp.int32), size=size)
    tokens_1S = jnp.zeros((1, size), jnp.int32)
    whole = flops(lambda state, x: nnx.merge(graph, state)(x)[0], tokens_1S)
    return flops(step, tokens_1S[:, :1], cache), whole

  (short, _), (long, whole) = costs(64), costs(512)
  assert long < 8 * short  # attention to eight times as many slots, and all else once
  assert long < whole / 100
