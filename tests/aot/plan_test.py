"""OLMoE's own training step, compiled for 256 chips without one, is what was planned.

Needs the libtpu that the installed jax pins (the extra `aot`); run with `-m aot`.
"""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments.planning import compiled, models, step, topology, work
from experiments.planning.mesh import Mesh

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def question():
  run = models.load("olmoe:1b-7b", rows=256)
  return step.Question(run, Mesh(fsdp=256), topology.parse("v5e:16x16"), 1.25, 0.3)


@pytest.fixture(scope="module")
def found(question):
  return compiled.measured(question)


def test_memory_is_planned_within_a_tenth(question, found):
  planned = step.plan(question, step.LOCAL).memory
  compiled.show(question, found)
  assert planned.state == pytest.approx(found.arguments, rel=0.01)
  assert planned.peak == pytest.approx(found.peak, rel=0.10)


def test_flops_are_planned_within_a_tenth(question, found):
  flops = work.of(question.run)
  planned = flops.multiplied(found.filled) / question.mesh.devices
  assert planned == pytest.approx(found.counted.flops, rel=0.10)


def test_parameters_are_gathered_as_planned(question, found):
  planned = sum(
    e.size
    for e in step.plan(question, step.LOCAL).exchanges
    if e.collective == "all_gather"
  )
  _, size = found.counted.collectives["all_gather"]
  assert planned == pytest.approx(size, rel=0.10)
