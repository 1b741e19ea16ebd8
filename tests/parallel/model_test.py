"""A whole model over a mesh has the loss, gradients and plans of one device."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jmoe
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models import over_mesh
from jmoe.parallel import EXPERT_TENSOR, mesh, param_specs
from tests._cases import quickly
from tests.tolerance import assert_close

B, S, V = 4, 8, 12
TWO_HEADS = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
LAYER = jmoe.simple(8, 8, num_experts=4, k=2)


def model(sharding):
  ff = dataclasses.replace(LAYER, sharding=sharding)
  blocks = tuple(BlockConfig(Attention(num_heads=2), one) for one in (Dense(8), ff))
  config = ModelConfig(V, 8, segments=((blocks, 1),), tied=False, sharding=sharding)
  return jmoe.models.Decoder(config, rngs=nnx.Rngs(0))


def outcome(sharding, place=lambda params: params):
  graph, params, rest = nnx.split(model(sharding), nnx.Param, ...)
  params = place(params)
  draw = np.random.default_rng(0)
  tokens_BS, target_BS = (draw.integers(0, V, (B, S)).astype(np.int32) for _ in "ab")
  weight_BS = draw.uniform(0.0, 1.0, (B, S)).astype(np.float32)
  segment_BS = np.ones((B, S), np.int32)
  segment_BS[:, 5:] = 2

  @jax.jit
  def run(params):
    def loss_fn(params):
      decoder = nnx.merge(graph, params, rest)
      x_BSD, infos = decoder.hidden(
        tokens_BS, segment_BS, look=lambda plan: _choices(plan.routing)
      )
      loss, nats_BS = decoder.cross_entropy(x_BSD, target_BS, weight_BS, z_loss=0.1)
      return loss + jmoe.total_loss(infos, {"load_balance": 0.1}), (nats_BS, infos)

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  with quickly():
    (loss, (nats_BS, infos)), grads = run(params)
  return jax.device_get(
    (loss, nats_BS, [i.plan for i in infos], jax.tree.leaves(grads))
  )


@functools.cache
def alone():
  """What one device gives."""
  return outcome(None)


def _choices(routing):
  """i32[T,E] how often each token of the call asks for each expert."""
  return jnp.zeros((B * S, 4), int).at[routing.token, routing.expert].add(1)


@pytest.mark.contract
def test_a_model_over_a_mesh_is_that_of_one_device():
  # What a layer's own tests leave out: sequences, heads and the vocabulary are split.
  with jax.set_mesh(mesh.make("context=2,tensor=2", devices=jax.devices()[:4])):
    found = outcome(EXPERT_TENSOR)
  jax.tree.map(assert_close, found, alone())


@pytest.mark.contract
def test_a_model_runs_over_explicit_axes_too():
  over = mesh.make("data=2,expert=2", devices=jax.devices()[:4], explicit=True)

  def place(params):
    pure = nnx.to_pure_dict(params)
    specs = param_specs(pure, EXPERT_TENSOR, over.shape)
    put = jax.tree.map(
      lambda x, at: jax.device_put(x, NamedSharding(over, at)), pure, specs
    )
    nnx.replace_by_pure_dict(params, put)
    return params

  with jax.set_mesh(over):
    found = outcome(EXPERT_TENSOR, place)
  jax.tree.map(assert_close, found, alone())


@pytest.mark.contract
def test_a_model_is_traced_over_axes_of_both_types():
  kinds = AxisType.Explicit, AxisType.Auto
  over = jax.make_mesh((2, 2), ("data", "expert"), kinds, devices=jax.devices()[:4])
  decoder = model(EXPERT_TENSOR)
  with jax.set_mesh(over):
    tokens_BS = jax.ShapeDtypeStruct((B, S), jnp.int32)
    y_BSV, _ = jax.eval_shape(lambda tokens_BS: decoder(tokens_BS), tokens_BS)
  assert y_BSV.shape == (B, S, V)


def test_heads_may_fold_onto_the_devices_of_experts():
  folded = dataclasses.replace(EXPERT_TENSOR, heads=("expert",))
  over = mesh.make("data=2,expert=2", devices=jax.devices()[:4])
  shapes = {"segments": {"0": {"0": {"attention": {"query": {"kernel": TWO_HEADS}}}}}}
  (at,) = jax.tree.leaves(
    param_specs(shapes, folded, over.shape), is_leaf=lambda x: isinstance(x, P)
  )
  assert "expert" in jax.tree.leaves(tuple(at))
  with jax.set_mesh(over):
    found = outcome(folded)
  jax.tree.map(assert_close, found, alone())


def test_a_model_inside_shard_map_is_refused():
  over = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

  def local(x):
    return over_mesh.activations(x, EXPERT_TENSOR)

  with pytest.raises(ValueError, match="inside shard_map over .'data',.: the model"):
    jax.shard_map(local, mesh=over, in_specs=P("data"), out_specs=P("data"))(
      jnp.zeros((8, 4, 8))
    )


def test_what_is_no_table_is_refused():
  with pytest.raises(TypeError, match="sharding='data' is no table"):
    blocks = (BlockConfig(Attention(num_heads=2), Dense(8)),)
    ModelConfig(V, 8, segments=((blocks, 1),), sharding="data")  # type: ignore
