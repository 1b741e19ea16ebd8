"""What is sent to a GPU goes in pieces, and its kernels serve every shard of a mesh."""
# SPDX-License-Identifier: Apache-2.0

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments.benchmarks.mesh import layer
from experiments.benchmarks.peers import ours
from experiments.benchmarks.shapes import Shape
from jmoe.dispatch import exchange
from jmoe.kernels import devices

SHAPE = Shape(256, 128, 8, 2, 1024)


@pytest.mark.parametrize("pieces", [1, 4, 16])
def test_pieces_cover_what_each_device_is_sent(pieces):
  count_n = np.array([0, 3, 16, 37], np.int32)
  first_nP, size_nP = map(np.asarray, exchange._cut(jnp.asarray(count_n), pieces))
  assert first_nP.shape == size_nP.shape == (4, pieces)
  assert (size_nP >= 0).all()
  np.testing.assert_array_equal(size_nP.sum(1), count_n)
  np.testing.assert_array_equal(first_nP[:, 1:], (first_nP + size_nP)[:, :-1])


def test_messages_are_cut_on_gpus_alone_and_small_ones_less():
  assert exchange._num_pieces(10**6, 2) == 1  # a CPU
  with devices.as_if("hopper"):
    found = [exchange._num_pieces(rows, 4) for rows in (10, 640, 10**6)]
  assert found == [1, 8, exchange.PIECES]


@pytest.mark.skipif(
  jax.__version_info__ < (0, 10), reason="Hopper's kernels need jax 0.10"
)
@pytest.mark.parametrize("strategy", ["all_to_all", "ragged_all_to_all"])
def test_shards_run_the_kernels_of_hopper_and_nothing_dense(strategy):
  factor = 1.25 if strategy == "all_to_all" else None
  given: Any = {}
  if jax.__version_info__ >= (0, 11):  # Pallas asks what it compiles for
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    given["abstract_device"] = gpu
  mesh: Any = jax.sharding.AbstractMesh((1, 2), layer.AXES, **given)
  step = layer.step(layer.sharded(SHAPE, layer.Way(strategy, factor=factor), mesh))
  whole = Shape(256, 128, 8, 2, 2048)
  at = NamedSharding(mesh, layer.SPLIT)

  def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

  params, x = jax.tree.map(
    lambda a: struct(a.shape, a.dtype), jax.eval_shape(lambda: ours.operands(whole))
  )
  weight, expert = (struct((2048, 2), t) for t in (jnp.float32, jnp.int32))
  with devices.as_if("hopper"), jax.numpy_dtype_promotion("standard"):
    traced = jax.jit(step).trace(params, x, weight, x, expert)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # Two products into the hidden layer and one out of it, and their gradients.
  assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 7
  assert not re.search(r"stablehlo\.(dot|dot_general)|ragged_dot", text)
  if strategy == "ragged_all_to_all":
    sizes = re.findall(r"custom_call @ragged_all_to_all.*?tensor<(\d+)xi32>", text)
    assert sizes == 2 * ["128", "256"]  # pieces; from twice the room they come home
