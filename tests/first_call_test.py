"""A layer called eagerly, as in a notebook, answers within two seconds at first."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, time
import jax, jax.numpy as jnp
from flax import nnx
import jmoe, jmoe.nnx

def seconds(function):
  wall, cpu = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function())
  return result, (time.perf_counter() - wall, time.process_time() - cpu)

x = jax.block_until_ready(jnp.ones((4, 64, 512)))
moe = jmoe.nnx.MoE(512, 2048, num_experts=8, k=2, rngs=nnx.Rngs(0))
jax.block_until_ready(moe.params())
_, first = seconds(lambda: moe(x)[0])
_, second = seconds(lambda: moe(x)[0])
print(json.dumps(dict(first=first, second=second)))
"""


def measure() -> dict[str, tuple[float, float]]:
  """(wall, processor) seconds of the first and the second call, in a fresh process."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # as users
  done = subprocess.run(
    [sys.executable, "-c", CODE],
    capture_output=True,
    text=True,
    check=True,
    env=environment,
  )
  return json.loads(done.stdout)


@pytest.mark.slow
def test_the_first_eager_call_takes_at_most_two_seconds():
  runs = []
  for _ in range(2):  # the better of two
    # Processor time is what the call would take on a machine that does nothing else,
    # except that processes which share a core slow each other down.
    crowded = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    limit = 3.0 if crowded else 2.0
    runs.append(min(measure()["first"]))
    if runs[-1] <= limit:
      return
  assert min(runs) <= limit, f"the first call took {runs} s"
