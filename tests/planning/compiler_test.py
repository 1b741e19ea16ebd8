"""Planned memory of one device beside what a CPU's compiler asks for."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import numpy as np
import pytest

from experiments import batches, configs, program
from experiments.planning import step, topology
from experiments.planning.mesh import Mesh
from experiments.settings import with_settings

RUN = with_settings(
  configs.load("tiny"),
  ["data.seq=64", "data.batch=64", "data.eval_context=8", "model.remat=True"],
)
MADE = program.program(RUN, byte_lengths=np.ones(258, np.int32), num_domains=1)


def test_a_plan_is_within_a_third_of_what_this_compiler_asks_for():
  """It fuses less than those of TPUs, for which `tests/aot` is stricter."""
  batch = batches.shapes(RUN.data.batch, RUN.data.seq)
  lowered = jax.jit(MADE.train_step).lower(jax.eval_shape(MADE.init), batch)
  used: Any = lowered.compile().memory_analysis()
  question = step.Question(RUN, Mesh(), topology.parse("v5e:1x1"), 1.25, 0.3)
  planned = step.plan(question, step.LOCAL).memory
  # What no step reads, the domain, is no argument.
  read = planned.state - 4 * RUN.data.batch * RUN.data.seq
  assert used.argument_size_in_bytes == pytest.approx(read, abs=64)
  peak = used.argument_size_in_bytes + used.temp_size_in_bytes
  print(f"planned {planned.peak / peak:.2f} of {peak / 2**20:.0f} MiB")
  assert planned.peak == pytest.approx(peak, rel=0.33)
