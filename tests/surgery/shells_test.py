"""Operations on one's own models, of Linen alone or of NNX alone."""
# SPDX-License-Identifier: Apache-2.0

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jmoe.linen
import jmoe.nnx
from jmoe import Context, layer as layers, presets, surgery
from jmoe.parallel import mesh
from jmoe.surgery import merge, upcycle
from tests.surgery import cases
from tests.tolerance import assert_close

V, B, S = 11, 2, 6
IDS = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
KEPT = {"MoE_0": [0, 3], "MoE_1": [1, 2]}
PARTS = sorted(KEPT)


class Linen(nn.Module):
  """Two sparse layers between an embedding and logits."""

  configs: tuple

  @nn.compact
  def __call__(self, ids, domain=None):
    x = nn.Embed(V, cases.D)(ids)
    for config in self.configs:
      moe = jmoe.linen.MoE(config)
      x += moe(x, context=Context(token_id=ids, domain_id=domain))[0]
    return nn.Dense(V)(x)


class NNX(nnx.Module):
  """The same."""

  def __init__(self, configs, rngs):
    self.embed = nnx.Embed(V, cases.D, rngs=rngs)
    for name, config in zip(PARTS, configs, strict=True):
      setattr(self, name, jmoe.nnx.MoE(config, rngs=rngs))
    self.out = nnx.Linear(cases.D, V, rngs=rngs)

  def __call__(self, ids, domain=None):
    x = self.embed(ids)
    for name in PARTS:
      context = Context(token_id=ids, domain_id=domain)
      x += getattr(self, name)(x, context=context)[0]
    return self.out(x)


def drawn(tree):
  random = np.random.default_rng(1)

  def one(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
      return np.asarray(random.integers(0, 6, x.shape), x.dtype)
    return np.asarray(0.5 * random.normal(size=x.shape), x.dtype)

  return jax.tree.map(one, tree)


def linen(config):
  """(model, variables)"""
  model = Linen((config, config))
  domain = jnp.zeros((B, S), jnp.int32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS, domain))
  return model, drawn(shapes)


def places(config):
  return {(name,): config for name in PARTS}


def cut(path, layer):
  return surgery.cut(layer, KEPT[path[-1]])


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *given):
  return model.apply(variables, *given)


def test_a_linen_model_and_its_moments_are_cut_as_a_decoder_is():
  config = cases.BALANCED
  model, variables = linen(config)
  moments = drawn(variables["params"])
  before = jax.tree.map(np.copy, variables)
  made, configs = surgery.on_linen(variables, places(config), cut)
  chex.assert_trees_all_equal(variables, before)
  (small, _) = surgery.on_linen({"params": moments}, places(config), cut)
  chex.assert_trees_all_equal_shapes(small["params"], made["params"])
  for name, kept in KEPT.items():
    part, old = made["params"][name], variables["params"][name]
    np.testing.assert_array_equal(
      part["experts"]["up_EDF"], old["experts"]["up_EDF"][kept]
    )
    np.testing.assert_array_equal(
      small["params"][name]["gate"]["kernel_DE"],
      moments[name]["gate"]["kernel_DE"][:, kept],
    )
    bias = made["moe_state"][name]["state"].bias
    np.testing.assert_array_equal(
      bias, variables["moe_state"][name]["state"].bias[kept]
    )
  cut_model = Linen(tuple(configs[name,] for name in PARTS))
  found = applied(cut_model, made, IDS)
  # Oracle: the definition of the layers, one after another.
  x = variables["params"]["Embed_0"]["embedding"][IDS.reshape(-1)]
  for name in PARTS:
    layer = surgery.of_linen(
      config, {c: tree[name] for c, tree in variables.items() if name in tree}
    )
    one = surgery.cut(layer, KEPT[name])
    x = x + np.asarray(jmoe.moe(one.params, x, one.config, state=one.state)[0])
  out = variables["params"]["Dense_0"]
  assert_close(found.reshape(-1, V), x @ out["kernel"] + out["bias"])
  # As a checkpoint that knows no types gives it, and a receipt of it.
  plain = jax.tree.map(
    lambda x: {"bias": x.bias} if isinstance(x, jmoe.State) else x,
    variables,
    is_leaf=lambda x: isinstance(x, jmoe.State),
  )
  other, _ = surgery.on_linen(plain, places(config), cut)
  chex.assert_trees_all_equal(other, made)
  moved = surgery.compared(applied(model, variables, IDS), found)
  assert moved["tokens"] == B * S and moved["largest"] > 0
  again, _ = surgery.on_linen(variables, places(config), lambda _, layer: layer)
  chex.assert_trees_all_equal(again, variables)
  with pytest.raises(KeyError, match="MoE_7"):
    surgery.on_linen(variables, {("MoE_7",): config}, cut)


def test_an_nnx_model_gives_what_the_linen_one_gives():
  config = cases.BALANCED
  _, variables = linen(config)
  model = NNX((config, config), nnx.Rngs(0))
  model = surgery.on_nnx(
    model,
    lambda path, _: surgery.of_linen(
      config, {c: tree[path[-1]] for c, tree in variables.items() if path[-1] in tree}
    ),
  )
  params = variables["params"]
  model.embed.embedding[...] = jnp.asarray(params["Embed_0"]["embedding"])
  model.out.kernel[...] = jnp.asarray(params["Dense_0"]["kernel"])
  model.out.bias[...] = jnp.asarray(params["Dense_0"]["bias"])
  made = surgery.on_nnx(model, cut)
  assert model.MoE_0.config == config and made.MoE_0.config.num_experts == 2
  small, configs = surgery.on_linen(variables, places(config), cut)
  expected = applied(Linen(tuple(configs[name,] for name in PARTS)), small, IDS)
  np.testing.assert_array_equal(nnx.jit(made)(IDS), expected)
  one = surgery.to_nnx(surgery.of_nnx(made.MoE_1))
  chex.assert_trees_all_equal(one.params(), made.MoE_1.params())
  chex.assert_trees_all_equal(one.get_state(), made.MoE_1.get_state())


def test_operations_on_models_serve_one_layer_too():
  config = cases.layer()
  _, variables = linen(config)
  layer = surgery.of_linen(
    config, {c: tree["MoE_0"] for c, tree in variables.items() if "MoE_0" in tree}
  )
  one = surgery.alone(layer)
  (again,) = surgery.layers(one)
  chex.assert_trees_all_equal(again, layer)
  both = merge.concatenate([one, one], rest="first")
  (back,) = surgery.layers(surgery.cut_model(both, [range(cases.E)]))
  assert back.config == config
  chex.assert_trees_all_equal(back, layer)
  x = np.random.default_rng(2).normal(size=(S, cases.D)).astype(np.float32)
  (wide,) = surgery.layers(upcycle.expand(one, times=2))
  run = jax.jit(jmoe.moe, static_argnums=2)
  assert_close(run(wide.params, x, wide.config)[0], run(layer.params, x, config)[0])
  # A dense feed-forward of one's own becomes experts, and comes back.
  up, gate, down = (
    np.random.default_rng(n).normal(size=shape).astype(np.float32)
    for n, shape in enumerate([(cases.D, 5), (cases.D, 5), (5, cases.D)])
  )
  matrices = {"up": up, "gate": gate, "down": down}
  made = upcycle.copied(matrices, num_experts=3, k=2, activation=jax.nn.silu)
  expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
  assert_close(run(made.params, x, made.config)[0], expected)
  chex.assert_trees_all_equal(surgery.feed_forward(made), matrices)


def test_layers_over_a_mesh_lie_as_they_lay():
  axes = mesh.make("expert=2,fsdp=2", devices=jax.devices()[:4])
  _, variables = linen(cases.BALANCED)

  def put(path, x):
    name = jax.tree_util.keystr(path)
    of_experts, up = "'experts'" in name, "_EDF" in name
    spec = ("expert" if of_experts else None, "fsdp" if up else None)
    return jax.device_put(x, NamedSharding(axes, PartitionSpec(*spec[: x.ndim - 1])))

  params = jax.tree_util.tree_map_with_path(put, variables["params"])
  spread = {**variables, "params": params}
  expected, _ = surgery.on_linen(variables, places(cases.BALANCED), cut)
  found, _ = surgery.on_linen(spread, places(cases.BALANCED), cut)
  chex.assert_trees_all_equal(found["params"], expected["params"])
  model = NNX((cases.BALANCED,) * 2, nnx.Rngs(0))
  for name in PARTS:
    own = {c: tree[name] for c, tree in spread.items() if name in tree}
    setattr(model, name, surgery.to_nnx(surgery.of_linen(cases.BALANCED, own)))
  made = surgery.on_nnx(model, cut)
  for name in PARTS:
    for tree in (found["params"][name], getattr(made, name).params()):
      jax.tree.map(lambda x, old: _lies_as(x, old), tree, params[name])


def _lies_as(x, old):
  assert x.sharding.is_equivalent_to(old.sharding, x.ndim)


def test_a_domains_sub_model_gives_its_logits_to_the_bit():
  """Of a model of domain-routed layers, PanGu-Sigma's."""
  config = presets.pangu_sigma.layer(
    d_model=cases.D, d_ff=5, vocab_size=V, num_domains=3, num_experts=6
  )
  model, variables = linen(config)
  assert layers.has_state(config)
  for number in range(3):
    domain = np.full((B, S), number, np.int32)
    own, configs = surgery.on_linen(
      variables,
      places(config),
      lambda _, layer, n=number: surgery.cut(layer, surgery.of_domain(layer, n)),
    )
    alone = applied(Linen(tuple(configs[name,] for name in PARTS)), own, IDS)
    expected = applied(model, variables, IDS, domain)
    np.testing.assert_array_equal(alone, expected)
    # With a fourth domain that begins as this one both give the same.
    grown, configs = surgery.on_linen(
      variables,
      places(config),
      lambda _, layer, n=number: surgery.grow.add_domain(layer, n),
    )
    larger = Linen(tuple(configs[name,] for name in PARTS))
    for each in (domain, np.full_like(domain, 3)):
      np.testing.assert_array_equal(applied(larger, grown, IDS, each), expected)
