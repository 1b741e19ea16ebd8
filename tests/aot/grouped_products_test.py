"""A layer's products, compiled for TPUs without one, do the work of its choices only.

Needs the libtpu that the installed jax pins (the extra `aot`); run with `-m aot`.  Half
the widths of Qwen3's layer, and as many rows for each expert, but only eight experts;
work is counted from the kernels' grids, as `experiments.benchmarks.grids` does.
"""
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import compiled_tpu, grids, shapes
from experiments.benchmarks.peers import ours
from jmoe.kernels import devices
from jmoe.kernels.grouped_matmul import reference

pytestmark = pytest.mark.aot

SHAPE = shapes.Shape(d_model=1024, d_ff=384, num_experts=8, k=2, tokens=8192)
TOPOLOGIES = ("v5e:1x1", "v6e:1x1")


def compiled(topology, matmul=None, *, backward):
  """The layer's figures, with the product that it chooses or with another."""
  loads = np.bincount(shapes.routing(SHAPE)[0].reshape(-1), minlength=SHAPE.num_experts)
  sharding = SingleDeviceSharding(compiled_tpu.chip(topology))
  layer = ours.layer(SHAPE, matmul=matmul)
  with devices.as_if("tpu"):
    made = compiled_tpu.lowered(
      layer, SHAPE, sharding, backward=backward, logits=False
    ).compile()
  sizes = -(-loads // devices.TPU_TILE) * devices.TPU_TILE
  return compiled_tpu.counted(made, SHAPE, sizes, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_work_is_that_of_the_choices(topology, backward):
  found = compiled(topology, backward=backward)
  print(f"{topology}: {found['ratio']:.3f} of the useful FLOPs")
  assert len(found["kernels"]) == (9 if backward else 3)
  assert 1.0 <= found["ratio"] <= 1.05
  assert not found["dense"]


def test_a_dense_product_is_seen():
  found = compiled(TOPOLOGIES[0], reference, backward=False)
  assert len(found["dense"]) == 3
  assert found["ratio"] > 0.9 * SHAPE.num_experts


def test_visits_are_those_that_a_loop_over_rows_finds():
  rng = np.random.default_rng(0)
  for _ in range(50):
    sizes = rng.integers(0, 40, 6)
    expert = np.repeat(np.arange(6), sizes)
    pairs = {(n // 8, e) for n, e in enumerate(expert)}
    assert grids.visits(sizes, 8) == len(pairs)
    assert grids.touched(sizes, 8) == len({tile for tile, _ in pairs})
