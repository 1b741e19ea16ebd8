"""The notebook's training step compiles for one TPU chip of 16 GB, without a TPU.

Needs the libtpu that the installed jax pins (the extra `aot`); run with `-m aot`.
"""

import os

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from experiments import configs, program
from experiments.vocabulary import VOCAB_SIZE

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def compiled():
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)
  )
  sharding = SingleDeviceSharding(topology.devices[0])

  def placed(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )

  run = configs.load("notebook")
  made = program.program(
    run, byte_lengths=np.ones(VOCAB_SIZE, np.int32), num_domains=13
  )
  state = jax.eval_shape(made.init)
  batch = {
    name: jax.ShapeDtypeStruct((run.data.batch, run.data.seq), np.int32)
    for name in ("inputs", "targets", "scored", "domain", "segment", "position")
  }
  step = jax.jit(made.train_step, donate_argnums=0)
  with jax.numpy_dtype_promotion("standard"):  # as users have it; attention needs it
    return step.lower(placed(state), placed(batch)).compile()


def test_it_fits_one_chip(compiled):
  used = compiled.memory_analysis()
  peak = (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    + used.temp_size_in_bytes
    - used.alias_size_in_bytes
  )
  print(f"peak {peak / 2**30:.2f} GiB")
  assert peak < 15 * 2**30


def test_the_state_is_updated_in_place(compiled):
  used = compiled.memory_analysis()
  assert used.alias_size_in_bytes > 0.99 * used.output_size_in_bytes
