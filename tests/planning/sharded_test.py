"""The step compiled for a mesh is the job's own; what a CPU's compiler asks for.

One step of one device and one of eight are compiled here, for both questions.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import numpy as np
import pytest

from experiments import configs, data, program
from experiments.planning import sharded, step, topology
from experiments.planning.mesh import Mesh
from experiments.settings import with_settings
from jmoe.parallel import mesh as meshes

RUN = with_settings(
  configs.load("tiny"),
  ["data.seq=64", "data.batch=64", "data.eval_context=8", "model.remat=True"],
)
MADE = program.program(RUN, byte_lengths=np.ones(258, np.int32), num_domains=1)


@pytest.fixture(scope="module")
def alone():
  """The step of one device, compiled."""
  batch = data.shapes(RUN.data.batch, RUN.data.seq)
  lowered = jax.jit(MADE.train_step).lower(jax.eval_shape(MADE.init), batch)
  return lowered.compile()


def test_a_step_over_data_fsdp_and_experts_is_the_step_of_one_device(alone):
  state, rng = MADE.init(), np.random.default_rng(0)
  shape = (RUN.data.batch, RUN.data.seq)
  batch = {name: np.ones(shape, np.int32) for name in data.shapes(*shape)}
  batch["inputs"], batch["targets"] = rng.integers(0, 258, (2, *shape), np.int32)
  one, metrics, _ = alone(state, batch)

  mesh = meshes.make("data=2,fsdp=2,expert=2")
  model = sharded.spread(RUN.model, "all_gather", 1.25)
  made = program.program(
    dataclasses.replace(RUN, model=model),
    byte_lengths=np.ones(258, np.int32),
    num_domains=1,
  )
  places = jax.tree.map(lambda x: x.sharding, sharded.placed(state, mesh))
  with sharded.over(mesh):
    together, other, _ = jax.jit(made.train_step)(
      jax.device_put(state, places), jax.device_put(batch, sharded.rows(mesh))
    )
  assert any(not s.is_fully_replicated for s in jax.tree.leaves(places))
  for name in ("loss", "gradient_norm"):
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-4)
  for name, x in one.params.items():
    np.testing.assert_allclose(together.params[name], x, rtol=2e-3, atol=2e-5)


def test_a_plan_is_within_a_third_of_what_this_compiler_asks_for(alone):
  """It fuses less than those of TPUs, for which `tests/aot` is stricter."""
  used = alone.memory_analysis()
  question = step.Question(RUN, Mesh(), topology.parse("v5e:1x1"), 1.25, 0.3)
  planned = step.plan(question, step.LOCAL).memory
  # What no step reads, the domain, is no argument.
  read = planned.state - 4 * RUN.data.batch * RUN.data.seq
  assert used.argument_size_in_bytes == pytest.approx(read, abs=64)
  peak = used.argument_size_in_bytes + used.temp_size_in_bytes
  print(f"planned {planned.peak / peak:.2f} of {peak / 2**20:.0f} MiB")
  assert planned.peak == pytest.approx(peak, rel=0.33)
