"""The training job's own step through the compiler of a TPU topology, without a TPU.

Needs the libtpu that the installed jax pins (the extra `aot`) and JAX_PLATFORMS=cpu.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import extras, program
from experiments.planning import hlo, step, work
from experiments.planning.local import Local, group_sizes
from experiments.planning.step import Question
from experiments.planning.topology import Topology
from experiments.spread import Spread
from experiments.strategies import GATHER, STRATEGIES, carrier
from jmoe import capacity
from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.kernels import devices
from jmoe.use import fact, use

_GIB = 2**30
_NAMES = {"local": GATHER, "gather experts": GATHER}  # the planner's -> the job's


class Compiled(NamedTuple):
  """What the compiler says of one device; bytes, FLOPs of a step."""

  arguments: float
  outputs: float
  temporaries: float
  aliased: float
  counted: hlo.Counted
  seconds: float  # that compiling took
  peak: float  # alive at one time, arguments included
  filled: float  # rows of experts with those that fill up tiles, over the rows

  @property
  def reserved(self) -> float:
    """What the program asks for: the peak, and what its heap cannot fill."""
    return self.arguments + self.outputs + self.temporaries - self.aliased


def check(question: Question, strategy: str) -> None:
  """Raises unless the step can be compiled for the topology.

  Raises:
    ValueError: no TPUs, or axes over which the job's step does not run.
    MissingExtra: there is no libtpu.
  """
  if question.topology.chip.kind != "tpu":
    raise ValueError(
      f"--compile: {question.topology.name} has no TPUs, and only those can be "
      "compiled for without the chips; leave --compile out."
    )
  if question.mesh.context > 1:
    raise ValueError(
      f"--compile: attention is not written for context={question.mesh.context}; use "
      "other axes, or leave --compile out."
    )
  if strategy not in (known := {*_NAMES, *STRATEGIES}):
    raise ValueError(
      f"--compile: layers have no strategy {strategy!r}; use --strategy with one of "
      f"{', '.join(sorted(known))}, or leave --compile out."
    )
  extras.check("libtpu", "aot", needed_by="--compile")


def measured(question: Question, strategy: str) -> Compiled:
  """Compiles the step of a run on a mesh of the topology; minutes.

  Raises:
    ValueError, MissingExtra: see `check`; or the compiler has no such topology.
  """
  check(question, strategy)
  run, began = question.run, time.monotonic()
  mesh = mesh_of(question.topology, question.mesh.sizes)
  try:
    compiled = lowered(run, mesh, strategy, question.factor).compile()
  except jax.errors.JaxRuntimeError as error:
    plan = step.plan(question, strategy)
    raise ValueError(
      f"--compile: the compiler refuses the step: {str(error).splitlines()[0][:300]} "
      f"(planned: {plan.memory.peak / _GIB:.1f} GiB); use fewer rows, more devices, or "
      "leave --compile out."
    ) from error
  used: Any = compiled.memory_analysis()
  local = Local(
    run,
    question.mesh,
    question.topology,
    _tokens(question),
    step.outcome_of(question, strategy),
  )
  ff = work.one_sparse(run.model)
  sizes_E, filled = np.zeros(1, np.int64), 1.0
  if ff is not None:
    with devices.as_if("tpu"):
      sizes_E = group_sizes(local, ff)
    filled = float(sizes_E.sum()) / (local.tokens * work.cost.experts_per_token(ff))
  return Compiled(
    used.argument_size_in_bytes,
    used.output_size_in_bytes,
    used.temp_size_in_bytes,
    used.alias_size_in_bytes,
    hlo.count(compiled.as_text(), sizes_E),
    time.monotonic() - began,
    used.peak_memory_in_bytes,
    filled,
  )


def mesh_of(topology: Topology, sizes: dict[str, int]) -> Mesh:
  """A mesh of described devices, in the order of the topology.

  Raises:
    ValueError: the compiler knows no such topology.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run
  from jax.experimental import topologies

  sides = topology.sides
  given: dict[str, Any] = {}
  if math.prod(sides) == 1:  # else a host is taken to have several
    given["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name, **given
    ).devices
  except Exception as error:  # the compiler's own has many classes
    raise ValueError(
      f"--topology {topology.name}: libtpu: {str(error).splitlines()[0][:200]}; use "
      "another topology, or leave --compile out."
    ) from error
  if len(found) != topology.devices:
    raise ValueError(
      f"--topology {topology.name}: the compiler sees {len(found)} devices, the plan "
      f"{topology.devices}; leave --compile out."
    )
  names = [axis for axis, size in sizes.items() if size > 1] or ["data"]
  shape = [sizes[axis] for axis in names]
  return Mesh(np.array(found).reshape(shape), names)


def lowered(run: Any, mesh: Mesh, strategy: str, factor: float = 1.25) -> Any:
  """The step of a run as its job makes it, on shapes with shardings."""
  spread = Spread(mesh, strategy=_NAMES.get(strategy, strategy))
  model = spread.model(_limited(run.model, spread, factor))
  run = dataclasses.replace(run, model=model)
  made = program.program(run, byte_lengths=np.ones(1, np.int32), num_domains=1)
  state = spread.shapes(jax.eval_shape(made.init))
  with (
    jax.numpy_dtype_promotion("standard"),  # as users have it; attention needs it
    devices.as_if("tpu"),
  ):
    return spread.train_step(made).lower(state, spread.batch_shapes(run))


def _limited(model: ModelConfig, spread: Spread, factor: float) -> ModelConfig:
  """With a capacity, where a strategy of buckets meets layers without one."""
  used = carrier(spread.strategy or GATHER)
  if used is None or fact(used, "dropless") is not False:
    return model

  def one(block: BlockConfig) -> BlockConfig:
    ff = block.ff
    if not isinstance(ff, MoEConfig) or ff.capacity is not None:
      return block
    limit = use(capacity.by_factor, factor=factor)
    limited = dataclasses.replace(
      ff, capacity=limit, group_size="row", dispatch=carrier
    )
    return dataclasses.replace(block, ff=limited)

  segments = tuple((tuple(map(one, blocks)), n) for blocks, n in model.segments)
  return dataclasses.replace(model, segments=segments)


def _tokens(question: Question) -> int:
  run, mesh = question.run, question.mesh
  return run.data.batch * run.data.seq // (mesh.rows * mesh.context)


def show(question: Question, strategy: str, found: Compiled) -> None:
  """Prints the compiler's figures beside the plan for the same step."""
  plan = step.plan(question, strategy)
  flops = work.of(question.run)
  planned = flops.multiplied(found.filled) / question.mesh.devices
  print(f"compiled by jax {jax.__version__} in {found.seconds:.0f} s, beside the plan")
  print(f"  {'':<26}{'compiled':>12}{'planned':>12}{'off by':>9}")
  for name, one, two in (
    ("state, GiB", found.arguments / _GIB, plan.memory.state / _GIB),
    (
      "temporaries, GiB",
      (found.peak - found.arguments) / _GIB,
      (plan.memory.peak - plan.memory.state) / _GIB,
    ),
    ("peak, GiB", found.peak / _GIB, plan.memory.peak / _GIB),
    ("TFLOPs", found.counted.flops / 1e12, planned / 1e12),
  ):
    print(f"  {name:<26}{one:12.3f}{two:12.3f}{two / max(one, 1e-9) - 1:9.1%}")
  print(f"  the program reserves {found.reserved / _GIB:.3f} GiB")
  for kind in sorted({*found.counted.collectives, *_by_kind(plan)}):
    calls, size = found.counted.collectives.get(kind, (0, 0.0))
    expected, planned = _by_kind(plan).get(kind, (0, 0.0))
    print(
      f"  {kind:<17}{calls:8,.0f} calls{size / 1e6:14,.1f} MB; planned {expected:6,} "
      f"calls{planned / 1e6:14,.1f} MB"
    )


def _by_kind(plan: step.Plan) -> dict[str, tuple[int, float]]:
  found: dict[str, tuple[int, float]] = {}
  for e in plan.exchanges:
    calls, size = found.get(e.collective, (0, 0.0))
    found[e.collective] = calls + e.count, size + e.size
  return found
