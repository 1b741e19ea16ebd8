"""The step that is compiled for a mesh is the job's own: equal on eight devices."""
# SPDX-License-Identifier: Apache-2.0

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments import configs, program
from experiments.planning import sharded, sharding
from experiments.settings import with_settings

FEATURES = ("inputs", "targets", "scored", "domain", "segment", "position")


@pytest.fixture
def run():
  # Losses of each device's own tokens are not those of all tokens together.
  return with_settings(configs.load("micro"), ["data.batch=8", "loss_weights=()"])


def test_a_step_over_data_and_fsdp_is_the_step_of_one_device(run, monkeypatch):
  monkeypatch.setattr(sharding, "_LEAST", 2**6)  # so that micro is divided at all
  made = program.program(run, byte_lengths=np.ones(258, np.int32), num_domains=1)
  state, rng = made.init(), np.random.default_rng(0)
  shape = (run.data.batch, run.data.seq)
  batch = {name: np.ones(shape, np.int32) for name in FEATURES}
  batch["inputs"], batch["targets"] = rng.integers(0, 258, (2, *shape), np.int32)
  alone, metrics, _ = jax.jit(made.train_step)(state, batch)

  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
  places = jax.tree.map(lambda x: x.sharding, sharded.placed(state, mesh))
  rows = NamedSharding(mesh, P(sharded.token_axes(mesh)))
  with sharded.over(mesh):
    together, other, _ = jax.jit(made.train_step)(
      jax.device_put(state, places), jax.device_put(batch, rows)
    )
  assert any(not s.is_fully_replicated for s in jax.tree.leaves(places))
  np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(
    other["gradient_norm"], metrics["gradient_norm"], rtol=1e-4
  )
  for name, x in alone.params.items():
    np.testing.assert_allclose(together.params[name], x, rtol=2e-3, atol=2e-5)
