"""What blocks keep by name, norms of queries and keys, layers that are no loop."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import keeping
from jmoe.analysis import cost
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from jmoe.models import Decoder, SelfAttention, rotary, unrolled
from tests import jaxprs
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, V, L = 16, 20, 2
ATTENTION = Attention(num_heads=4, num_kv_heads=2, qk_norm="all")
SPARSE = BlockConfig(ATTENTION, simple(D, 12, num_experts=4, k=2))
DENSE = BlockConfig(ATTENTION, Dense(d_ff=24))
CONFIG = ModelConfig(V, D, segments=(((DENSE, SPARSE), L),), remat=True)
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % V


@functools.cache
def built(config):
  return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


def loss(state, config):
  graph, _ = built(config)
  x_BSD, _ = nnx.merge(graph, state).hidden(TOKENS)
  return jnp.sum(jnp.sin(x_BSD))


def residuals(config):
  """Shapes of what the backward pass asks for, without the parameters."""
  _, state = built(dataclasses.replace(config, remat=True))
  asked = jax.eval_shape(lambda s: jax.vjp(lambda s: loss(s, config), s)[1], state)
  return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(asked))


def test_what_is_kept_changes_no_gradient_and_grows_name_by_name():
  one = dataclasses.replace(CONFIG, segments=(((SPARSE,), 1),))
  _, state = built(one)
  wanted = jax.jit(jax.grad(loss), static_argnums=1)(state, one)
  sizes = [residuals(one)]
  for count in range(1, len(keeping.NAMES) + 1):
    config = dataclasses.replace(one, remat=keeping.NAMES[:count])
    sizes.append(residuals(config))
  found = jax.jit(jax.grad(loss), static_argnums=1)(state, config)
  jax.tree.map(assert_close, found, wanted)
  assert sizes == sorted(set(sizes)), sizes  # each name keeps something more


def test_names_are_checked_when_a_model_is_configured():
  with pytest.raises(ValueError, match="remat keeps='hiden'.*'hidden'"):
    dataclasses.replace(CONFIG, remat=("hiden",))
  with pytest.raises(TypeError, match="remat='hidden'.*tuple of names"):
    dataclasses.replace(CONFIG, remat="hidden")


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="jax 0.10's primitive")
@pytest.mark.parametrize("names, runs", [(("residual",), 2), (("attention",), 1)])
def test_cudnn_attention_that_is_kept_is_not_run_again(names, runs, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)

  def block(q):
    # Only shapes are looked at: nothing here runs.
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    y = attend(jnp.sin(q), q, q, is_causal=True)
    return jnp.sum(jnp.sin(keeping.named(y, "attention").astype(jnp.float32)))

  kept = jax.checkpoint(block, policy=keeping.policy(names))
  made = jax.make_jaxpr(jax.grad(kept))(jnp.ones((1, 8, 2, 64), jnp.bfloat16))
  found = [e.primitive.name for e in jaxprs.equations(made)]
  assert found.count(keeping._CUDNN) == runs


@pytest.mark.parametrize("kind", ["all", "head"])
def test_queries_and_keys_have_norms_before_they_are_turned(kind):
  config = dataclasses.replace(ATTENTION, qk_norm=kind)
  layer = SelfAttention(config, D, dtype=jnp.float32, depth_scale=1.0, rngs=nnx.Rngs(0))
  random = np.random.default_rng(0)
  for one in (layer.query_norm, layer.key_norm):
    one.scale[...] = jnp.asarray(random.normal(size=one.scale.shape), jnp.float32)
  x_BSD = random.normal(size=(1, 5, D)).astype(np.float32)
  position_BS = np.arange(5)[None]
  for found, linear, one in zip(
    layer.project(x_BSD, position_BS),
    (layer.query, layer.key),
    (layer.query_norm, layer.key_norm),
  ):
    h = x_BSD @ np.asarray(linear.kernel[...])
    if kind == "head":
      h = h.reshape(1, 5, -1, D // 4)
    h = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-6) * one.scale[...]
    h = h.reshape(1, 5, -1, D // 4)
    assert_close(found, rotary(h, position_BS, theta=1e4))
  model = ModelConfig(V, D, segments=(((BlockConfig(config, Dense(8)),), 3),))
  _, state = built(model)
  count = sum(x.size for x in jax.tree.leaves(state))
  assert cost.parameters(model).total == count


def test_layers_one_by_one_are_those_of_the_loop():
  apart = unrolled(CONFIG)
  assert [repeat for _, repeat in apart.segments] == [1, 1] and unrolled(apart) == apart
  graph, state = built(CONFIG)
  model = nnx.merge(graph, state)
  other = Decoder(apart, rngs=nnx.Rngs(1))
  other.embed, other.norm = model.embed, model.norm
  for n in range(L):
    for m, block in enumerate(model.segments[0]):
      own = jax.tree.map(lambda x, n=n: x[n : n + 1], nnx.state(block))
      nnx.update(other.segments[n][m], own)
  (x_BSD, infos), (y_BSD, of_each) = (
    jax.jit(lambda state, graph=graph: nnx.merge(graph, state).hidden(TOKENS))(state)
    for graph, state in map(nnx.split, (model, other))
  )
  assert_close(y_BSD, x_BSD)
  for n, info in enumerate(of_each):
    assert info.load.shape == (1, 4)
    np.testing.assert_array_equal(info.load[0], infos[0].load[n])
  made = jax.make_jaxpr(lambda t: other.hidden(t)[0])(TOKENS)
  assert "scan" not in {e.primitive.name for e in made.eqns}
  seen = []

  def before(layer, parameters, x_BSD):
    seen.append(layer)
    return jax.tree.map(jnp.zeros_like, parameters), x_BSD * 0 + 1

  z_BSD = jax.jit(lambda tokens: other.hidden(tokens, before=before)[0])(TOKENS)
  assert seen == [0, 2]
  np.testing.assert_array_equal(z_BSD, np.ones_like(z_BSD))
