"""OLMoE's own training step, compiled for 256 chips without one, is what was planned.

Needs the libtpu that the installed jax pins (the extra `aot`); run with `-m aot`.
"""
# SPDX-License-Identifier: Apache-2.0

import pytest

from experiments.planning import compiled, models, step, topology, work
from experiments.planning.mesh import Mesh

pytestmark = pytest.mark.aot


CASES = {
  "fsdp": (Mesh(fsdp=256), step.LOCAL),
  "experts": (Mesh(fsdp=64, expert=4), "all_gather"),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
  """(question, strategy, what the compiler says)"""
  mesh, strategy = CASES[request.param]
  run = models.load("olmoe:1b-7b", rows=256)
  question = step.Question(run, mesh, topology.parse("v5e:16x16"), 1.25, 0.3)
  return question, strategy, compiled.measured(question, strategy)


def test_memory_is_planned_within_a_tenth(case):
  question, strategy, found = case
  planned = step.plan(question, strategy).memory
  compiled.show(question, strategy, found)
  assert planned.state == pytest.approx(found.arguments, rel=0.01)
  assert planned.peak == pytest.approx(found.peak, rel=0.10)


def test_flops_are_planned_within_a_tenth(case):
  question, _, found = case
  flops = work.of(question.run)
  planned = flops.multiplied(found.filled) / question.mesh.devices
  assert planned == pytest.approx(found.counted.flops, rel=0.10)


def test_parameters_and_tokens_are_gathered_as_planned(case):
  question, strategy, found = case
  planned = sum(
    e.size
    for e in step.plan(question, strategy).exchanges
    if e.collective == "all_gather"
  )
  _, size = found.counted.collectives["all_gather"]
  assert planned == pytest.approx(size, rel=0.10)
