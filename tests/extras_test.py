"""A package that is not installed is named with the line that installs it."""
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
import time

import pytest

from experiments import extras

# `None` in sys.modules is how Python is told that a module is not there.
CODE = """
import runpy, sys
sys.modules[{module!r}] = None
sys.argv = ["experiments.main", "--config", "tiny", "--workdir", {workdir!r}]
runpy.run_module("experiments.main", run_name="__main__")
"""


@pytest.mark.parametrize(
  ("module", "extra"),
  [("grain", "data"), ("tensorflow_datasets", "data"), ("tqdm", "train")],
)
def test_main_job_names_the_missing_extra_at_once(module, extra, tmp_path):
  code = CODE.format(module=module, workdir=str(tmp_path / "run"))
  start = time.perf_counter()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode != 0
  (line,) = done.stderr.strip().splitlines()
  assert module in line
  assert f"pip install 'jmoe[{extra}]'" in line
  assert not (tmp_path / "run").exists()
  assert time.perf_counter() - start < 20


def test_require_returns_the_module_or_says_how_to_install_it():
  assert extras.require("json", "data", needed_by="this test") is sys.modules["json"]
  for absent in ("no_such_package", "no_such_package.part"):
    with pytest.raises(ImportError, match=r"this test .*pip install 'jmoe\[hf\]'"):
      extras.require(absent, "hf", needed_by="this test")
