"""Counted costs agree with real models and with sums by hand."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import jax
import pytest
from flax import nnx

from jmoe import use
from jmoe.analysis import cost
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, MoEConfig, simple
from jmoe.dispatch import buckets
from jmoe.models import Decoder
from jmoe.routers import expert_choice

pytestmark = pytest.mark.contract

ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=6)
DENSE = BlockConfig(ATTENTION, Dense(d_ff=24, gated=False))
SHARED = simple(16, 12, num_experts=4, k=2, shared_d_ff=8)
SPARSE = BlockConfig(ATTENTION, SHARED, norm="layer")
MODEL = ModelConfig(40, 16, segments=(((DENSE,), 1), ((SPARSE, DENSE), 2)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_parameters_are_those_of_the_module(tied, norm):
  config = dataclasses.replace(MODEL, tied=tied, norm=norm)
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert cost.parameters(config).total == sum(math.prod(p.shape) for p in params)


def test_active_parameters_leave_out_the_experts_not_chosen():
  counted = cost.parameters(MODEL)
  expert = 3 * 16 * 12
  assert counted.total - counted.active == 2 * (4 - 2) * expert


def test_the_counts_of_mixtral_8x7b():
  """Jiang et al. 2024 (arXiv:2401.04088): 46.7B in all, 12.9B active."""
  block = BlockConfig(
    Attention(num_heads=32, num_kv_heads=8), simple(4096, 14336, num_experts=8, k=2)
  )
  counted = cost.parameters(ModelConfig(32000, 4096, (((block,), 32),), tied=False))
  assert counted.total == 46_702_792_704
  assert round(counted.active / 1e9, 2) == 12.88


def test_flops_are_those_summed_by_hand():
  seq = 10
  attention = 2 * 16 * 6 * (4 + 2 + 2 + 4) + 2 * (2 * seq * 4 * 6)  # qkvo, qk and av
  dense = 2 * (2 * 16 * 24)
  sparse = 2 * (2 * 3 * 16 * 12) + 2 * (3 * 16 * 8) + 2 * 16 * 4  # chosen, shared, gate
  logits = 2 * 16 * 40
  expected = 3 * (attention + dense) + 2 * (attention + sparse) + logits
  assert cost.flops_per_token(MODEL, seq=seq) == expected


def test_expert_choice_costs_its_capacity_factor():
  router = use(expert_choice, capacity_factor=1.5)
  layer = MoEConfig(16, 4, router=router, dispatch=use(buckets), losses=())
  assert cost.experts_per_token(layer) == 1.5


def test_the_dense_equal_has_the_flops_of_the_sparse_model():
  dense = cost.equal_active_flops(MODEL)
  blocks = [block for blocks, _ in dense.segments for block in blocks]
  assert all(isinstance(block.ff, Dense) for block in blocks)
  assert blocks[1].ff.d_ff == 2 * 12 + 8 + 1  # chosen, shared, and the gate's 64 / 48
  column = 2 * 3 * 16
  sparse_flops = cost.flops_per_token(MODEL, seq=8)
  assert abs(cost.flops_per_token(dense, seq=8) - sparse_flops) <= 2 * column / 2
  assert cost.equal_active_flops(dense) == dense
