"""What a profiler printed, as shares of what tensor cores need."""
# SPDX-License-Identifier: Apache-2.0

import subprocess

import pytest

from experiments.benchmarks import counters, shapes
from jmoe.kernels import hopper

CYCLES = 1000.0


def test_launches_for_pieces_count_together(monkeypatch):
  """Of two passes: a kernel of two products, once a pass or in two pieces."""
  names = ["ffn_hidden_mosaic_gpu_kernel"] * 4 + [
    "grouped_matmul_mosaic_gpu_kernel"
  ] * 2
  lines = ['"ID","Kernel Name","Metric Name","Metric Value"']
  for n, name in enumerate(names):
    lines.append(f'"{n}","{name}","{counters.METRICS["cycles"]}","{CYCLES:,.0f}"')
  told = []

  def ran(command, **_):
    told.append(command)
    return subprocess.CompletedProcess(command, 0, "\n".join(["==PROF==", *lines]), "")

  monkeypatch.setattr(subprocess, "run", ran)
  monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
  found = {row["name"]: row for row in counters.counted("tiny")}
  one = 2.0 * 512 * 2 * 256 * 128 / (132 * 4096)  # cycles of a product, at least
  assert shapes.SHAPES["tiny"] == shapes.Shape(256, 128, 8, 2, 512)
  hidden, down = (found[name] for name in dict.fromkeys(names))
  assert (hidden["count"], down["count"]) == (4, 2)
  assert hidden["tensor"] == pytest.approx(2 * one / (2 * CYCLES))
  assert down["tensor"] == pytest.approx(one / CYCLES)
  assert told[0][told[0].index("--kernel-name") + 1].startswith("regex:")
