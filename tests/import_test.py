"""`import jmoe` needs jax and flax alone, and costs little beside them."""
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.contract

CODE = """
import json, sys, time
import jax, flax
before = set(sys.modules)
start = time.process_time()  # others may use the machine
import jmoe
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
old = {name.partition(".")[0] for name in before}
json.dump(dict(seconds=seconds, new=sorted(new - old - set(sys.stdlib_module_names)),
               loaded=sorted(old | new)), sys.stdout)
"""


def measure() -> dict:
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_import_adds_less_than_half_a_second_to_jax_and_flax():
  runs = []
  for _ in range(3):  # the first may compile to bytecode
    runs.append(measure()["seconds"])
    if runs[-1] < 0.5:
      return
  assert min(runs) < 0.5, f"import jmoe took {runs} s after jax and flax"


def test_import_loads_nothing_beside_jax_and_flax():
  found = measure()
  assert found["new"] == ["jmoe"], "what `import jmoe` loads beside jax and flax"
  extras = {"optax", "orbax", "grain", "tensorflow_datasets", "chex", "tqdm"}
  assert not extras & set(found["loaded"])


@pytest.mark.parametrize("name", ["mesh", "adaptive", "explain", "TABLES"])
def test_what_the_page_on_meshes_names_is_there(name):
  code = f"import jmoe; jmoe.parallel.{name}"
  subprocess.run([sys.executable, "-c", code], check=True)
