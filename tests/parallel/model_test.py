"""A whole model over a mesh has the loss, gradients and plans of one device."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models import over_mesh
from jmoe.parallel import EXPERT_TENSOR, mesh
from tests.tolerance import assert_close

B, S, V = 4, 8, 12
LAYER = jmoe.simple(8, 8, num_experts=4, k=2)


def model(sharding):
  ff = dataclasses.replace(LAYER, sharding=sharding)
  blocks = tuple(BlockConfig(Attention(num_heads=2), one) for one in (Dense(8), ff))
  config = ModelConfig(V, 8, segments=((blocks, 1),), tied=False, sharding=sharding)
  return jmoe.models.Decoder(config, rngs=nnx.Rngs(0))


def outcome(sharding):
  graph, params, rest = nnx.split(model(sharding), nnx.Param, ...)
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

  (loss, (nats_BS, infos)), grads = run(params)
  return jax.device_get(
    (loss, nats_BS, [i.plan for i in infos], jax.tree.leaves(grads))
  )


def _choices(routing):
  """i32[T,E] how often each token of the call asks for each expert."""
  return jnp.zeros((B * S, 4), int).at[routing.token, routing.expert].add(1)


@pytest.mark.contract
def test_a_model_over_a_mesh_is_that_of_one_device():
  alone = outcome(None)
  # What a layer's own tests leave out: sequences, heads and the vocabulary are split.
  with jax.set_mesh(mesh.make("context=2,tensor=2", devices=jax.devices()[:4])):
    found = outcome(EXPERT_TENSOR)
  jax.tree.map(assert_close, found, alone)


def test_a_table_and_a_mesh_of_explicit_axes_are_refused():
  with jax.set_mesh(mesh.make("data=8", explicit=True)):
    with pytest.raises(ValueError, match="use a mesh of AxisType.Auto"):
      over_mesh.activations(jnp.zeros((8, 4, 8)), EXPERT_TENSOR)


def test_what_is_no_table_is_refused():
  with pytest.raises(TypeError, match="sharding='data' is no table"):
    blocks = (BlockConfig(Attention(num_heads=2), Dense(8)),)
    ModelConfig(V, 8, segments=((blocks, 1),), sharding="data")  # type: ignore
