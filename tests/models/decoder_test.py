"""The decoder: who sees whom, padding, scan, remat, replayed choices, state."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import balance, contexts, noise, use
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from jmoe.models import Decoder, decoder, rotary
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, V, S = 16, 40, 8
ATTENTION = Attention(num_heads=4, num_kv_heads=2)
DENSE = BlockConfig(ATTENTION, Dense(d_ff=24))
SPARSE = BlockConfig(ATTENTION, simple(D, 12, num_experts=4, k=2))
MIXED = ModelConfig(V, D, segments=(((DENSE, SPARSE), 2),), tied=False, remat=False)


@functools.cache
def built(config: ModelConfig):
  """A model as (graph, parameters and state), the same for equal configurations.

  NumPy draws the parameters: compiling jax's random numbers takes longer than a test.
  """
  graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  random = np.random.default_rng(0)

  def draw(x):
    scale = x.shape[-2] ** -0.5 if len(x.shape) > 2 else 1.0
    return jnp.asarray(random.normal(size=x.shape) * scale, x.dtype)

  return graph, jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnames=("graph", "train"))
def apply(graph, state, tokens_BS, segment_BS=None, key=None, forced=None, train=False):
  model = nnx.merge(graph, state)
  return model(tokens_BS, segment_BS, key=key, forced=forced, train=train)


def influence(config, tokens_BS, segment_BS) -> np.ndarray:
  """[S,S]: how much the logits at each place of row 0 change with each token of it.

  Tokens must be distinct, so that a row of the embedding stands for one place.
  """
  graph, state = built(config)

  @jax.jit
  def jacobian(state):
    def logits(state):
      return jnp.sum(nnx.merge(graph, state)(tokens_BS, segment_BS)[0][0], axis=-1)

    return jax.jacrev(logits)(state)

  leaves = jax.tree_util.tree_leaves_with_path(jacobian(state))
  (by_token_SVD,) = [x for path, x in leaves if "'embed'" in jax.tree_util.keystr(path)]
  return np.abs(np.asarray(by_token_SVD)).sum(-1)[:, np.asarray(tokens_BS)[0]]


def test_a_token_is_seen_by_later_tokens_of_its_document_and_by_no_others():
  tokens_BS = jnp.arange(S)[None]
  segment_BS = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
  seen_SS = influence(MIXED, tokens_BS, segment_BS) > 0
  same_SS = np.asarray(segment_BS[0][:, None] == segment_BS[0][None, :])
  np.testing.assert_array_equal(seen_SS, np.tril(same_SS))


def test_without_causality_a_document_sees_all_of_itself():
  attention = dataclasses.replace(ATTENTION, causal=False)
  block = dataclasses.replace(DENSE, attention=attention)
  config = dataclasses.replace(MIXED, segments=(((block,), 1),))
  segment_BS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
  seen_SS = influence(config, jnp.arange(S)[None], segment_BS) > 0
  same_SS = np.asarray(segment_BS[0][:, None] == segment_BS[0][None, :])
  np.testing.assert_array_equal(seen_SS, same_SS)


def test_what_padding_holds_changes_nothing():
  graph, state = built(MIXED)
  tokens_BS = jnp.arange(2 * S).reshape(2, S)
  segment_BS = jnp.array([[1, 1, 2, 2, 2, 0, 0, 0], [0] * S])
  other_BS = jnp.where(segment_BS == 0, (tokens_BS * 7 + 3) % V, tokens_BS)
  logits, infos = apply(graph, state, tokens_BS, segment_BS)
  other_logits, other_infos = apply(graph, state, other_BS, segment_BS)
  chex.assert_tree_all_finite(logits)
  chex.assert_trees_all_equal(logits[0, :5], other_logits[0, :5])
  chex.assert_trees_all_equal(infos, other_infos)
  chex.assert_trees_all_equal(infos[0].load.sum(-1), jnp.full(2, 5 * 2))  # k = 2


def test_a_look_at_each_plan_is_kept_with_its_layer():
  graph, state = built(MIXED)
  tokens_BS = jnp.arange(2 * S).reshape(2, S)

  @jax.jit
  def looked(state):
    model = nnx.merge(graph, state)
    return model(tokens_BS, look=lambda plan: (plan.load, plan.routing.token[-1]))

  _, (info,) = looked(state)
  load_LGE, last_L = info.plan
  chex.assert_trees_all_equal(load_LGE, info.load[:, None])
  assert last_L.tolist() == [2 * S - 1] * 2
  _, (info,) = apply(graph, state, tokens_BS)
  assert info.plan is None


def test_a_packed_document_gets_the_logits_it_gets_alone():
  graph, state = built(MIXED)
  tokens_BS = jnp.arange(S)[None]
  packed, _ = apply(graph, state, tokens_BS, jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]))
  alone_BS = jnp.array([[3, 4, 5, 6, 0, 0, 0, 0]])
  alone, _ = apply(graph, state, alone_BS, jnp.array([[1, 1, 1, 1, 0, 0, 0, 0]]))
  assert_close(packed[0, 3:7], alone[0, :4])


def test_documents_of_equal_number_in_different_rows_share_no_segment():
  segment_BS = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 3, 3, 3, 3]])
  context = decoder._context(jnp.zeros((2, S), jnp.int32), segment_BS)
  segment_T = np.asarray(contexts.flatten(context, (2, S)).segment)
  documents = {}
  for token, segment in enumerate(segment_T.tolist()):
    key = (token // S, int(segment_BS.reshape(-1)[token]))
    assert documents.setdefault(segment, key) == key
  assert len(documents) == len(set(documents.values())) == 6  # one of them is padding


def test_scanned_layers_equal_layers_in_segments_of_their_own():
  layer = dataclasses.replace(
    SPARSE.ff,
    logit_noise=use(noise.gumbel),  # keys must not depend on the segments either
    balance=use(balance.update, rate=0.1),
  )
  block = dataclasses.replace(SPARSE, ff=layer)
  scanned = dataclasses.replace(MIXED, segments=(((block,), 3),))
  unrolled = dataclasses.replace(MIXED, segments=(((block,), 1),) * 3)
  model, other = nnx.merge(*built(scanned)), nnx.merge(*built(unrolled))
  for name in ("embed", "norm", "unembed"):
    nnx.update(getattr(other, name), nnx.state(getattr(model, name)))
  stacked = nnx.state(model.segments[0][0])
  for n in range(3):
    one = jax.tree.map(lambda x, n=n: x[n : n + 1], stacked)
    nnx.update(other.segments[n][0], one)
  tokens_BS = jnp.arange(2 * S).reshape(2, S)
  key = jax.random.key(5)
  logits, (info,) = apply(*nnx.split(model), tokens_BS, key=key, train=True)
  other_logits, infos = apply(*nnx.split(other), tokens_BS, key=key, train=True)
  assert_close(logits, other_logits)
  again = jax.tree.map(lambda *x: jnp.concatenate(x), *infos)
  chex.assert_trees_all_equal(info.load, again.load)
  chex.assert_trees_all_close(info, again, rtol=2e-5, atol=1e-5)


def test_remat_changes_neither_loss_nor_gradient():
  graph, state = built(MIXED)
  remat_graph, _ = built(dataclasses.replace(MIXED, remat=True))
  tokens_BS = jnp.arange(2 * S).reshape(2, S)

  @functools.partial(jax.jit, static_argnames="graph")
  def loss(graph, state):
    def mean_square(state):
      return jnp.mean(nnx.merge(graph, state)(tokens_BS)[0] ** 2)

    return jax.value_and_grad(mean_square)(state)

  chex.assert_trees_all_close(
    jax.tree.leaves(loss(graph, state)),
    jax.tree.leaves(loss(remat_graph, state)),
    rtol=2e-5,
    atol=1e-6,
  )


def test_forced_choices_are_split_over_the_sparse_layers():
  config = dataclasses.replace(
    MIXED, segments=(((DENSE, SPARSE), 2), ((DENSE,), 1), ((SPARSE,), 1))
  )
  graph, state = built(config)
  random = np.random.default_rng(0)
  order = random.permuted(np.tile(np.arange(4), (3 * 2 * S, 1)), axis=1)
  forced = order[:, :2].reshape(3, 2 * S, 2)
  tokens_BS = jnp.arange(2 * S).reshape(2, S)
  _, infos = apply(graph, state, tokens_BS, forced=jnp.asarray(forced))
  load_LE = np.concatenate([info.load for info in infos])
  expected = np.stack([np.bincount(ids.ravel(), minlength=4) for ids in forced])
  np.testing.assert_array_equal(load_LE, expected)


def test_update_writes_the_reported_state_of_every_layer():
  layer = dataclasses.replace(SPARSE.ff, balance=use(balance.update, rate=0.1))
  block = dataclasses.replace(SPARSE, ff=layer)
  config = dataclasses.replace(MIXED, segments=(((DENSE, block), 2), ((block,), 1)))
  graph, state = built(config)
  model = nnx.merge(graph, state)
  _, infos = apply(graph, state, jnp.arange(S)[None], train=True)
  chex.assert_shape([info.state.bias for info in infos], [(2, 4), (1, 4)])
  layers = [model.segments[0][1].moe, model.segments[1][0].moe]
  for layer, info in zip(layers, infos, strict=True):
    moved = np.abs(info.state.bias - layer.state.bias[...])
    assert np.all(moved < 0.11) and np.all(
      moved.max(-1) > 0.09
    )  # by the rate, from before
  model.update(infos)
  for layer, info in zip(layers, infos, strict=True):
    chex.assert_trees_all_equal(layer.state.bias[...], info.state.bias)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bfloat16_activations_keep_float32_logits_and_routing(norm):
  block = dataclasses.replace(SPARSE, norm=norm)
  config = dataclasses.replace(
    MIXED, segments=(((block,), 1),), norm=norm, tied=True, dtype="bfloat16"
  )
  graph, state = built(config)
  chex.assert_type(jax.tree.leaves(state), jnp.float32)
  logits, (info,) = apply(graph, state, jnp.arange(S)[None])
  chex.assert_shape(logits, (1, S, V))
  chex.assert_type([logits, info.entropy, *info.losses.values()], jnp.float32)
  chex.assert_tree_all_finite(logits)


def test_rotary_positions_act_by_their_difference_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 8))

  def scores(first: int, second: int):
    turned = [
      rotary(x, jnp.full((1, 1), p), theta=100.0) for x, p in ((q, first), (k, second))
    ]
    return jnp.sum(turned[0] * turned[1], axis=-1)

  assert_close(scores(3, 1), scores(13, 11))
  assert float(jnp.abs(scores(3, 1) - scores(3, 2)).max()) > 1e-2
