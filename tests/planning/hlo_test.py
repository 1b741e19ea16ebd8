"""Products and collectives of a compiled program, with the trips of its loops."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

from experiments.planning import hlo

LAYERS, N = 5, 16


def test_loops_count_as_often_as_they_run():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

  def local(x, weights):
    def layer(x, part):
      whole = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)
      return jnp.tanh(x @ whole), None

    x, _ = jax.lax.scan(layer, x, weights)
    return jax.lax.psum(x, ("data", "fsdp"))

  specs = P(("data", "fsdp")), P(None, "fsdp")
  run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8 * 4, N), (LAYERS, N, N))
  ]
  text = jax.jit(run).lower(*shapes).compile().as_text()
  assert text is not None
  found = hlo.count(text, np.zeros(1))
  assert found.flops == LAYERS * 2 * 4 * N * N
  assert found.collectives == {
    "all_gather": (LAYERS, LAYERS * N * N * 4 * 3 / 4),
    "all_reduce": (1, 2 * 4 * N * 4 * 7 / 8),
  }


def test_groups_are_read_however_they_are_written():
  for text, devices in (
    ("replica_groups={{0,1},{2,3}}, x", 2),
    ("replica_groups=[2,4]<=[8], x", 4),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, x", 4),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, x", 8),
  ):
    assert hlo._group(text) == devices
