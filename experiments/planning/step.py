"""A planned step: memory, exchanges and time of one run on one mesh by one strategy."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments.config import Run
from experiments.planning import (
  dense,
  drops,
  exchanges,
  memory,
  rates,
  topology as topologies,
  work,
)
from experiments.planning.exchanges import Exchange, Outcome
from experiments.planning.mesh import Mesh
from experiments.planning.topology import Topology

# Of a device's memory.  The rest is the runtime's, and what a compiler cannot fill:
# with 13.1 GiB alive at one time OLMoE's step asked a v5e for 15.2 of its 16.
USABLE = 0.85
LOCAL = "local"  # the strategy where no axis divides experts


@dataclasses.dataclass(frozen=True)
class Question:
  """What is planned."""

  run: Run
  mesh: Mesh
  topology: Topology
  factor: float  # slots over mean rows, for strategies with buckets
  skew: float  # standard deviation of the log of experts' popularity


class Times(NamedTuple):
  """Seconds of a step."""

  products: float
  experts: float
  attention: float
  again: float
  between: float  # norms, positions and sums between products, by HBM's bandwidth
  loops: float  # copies out of stacks of layers, zeros
  update: float  # of parameters and moments, by HBM's bandwidth
  parameters: float  # gathers and gradients
  hidden: float  # of these, what runs behind products
  rows: float  # exchanges that products wait for, and copies of rows for them

  @property
  def compute(self) -> float:
    products = self.products + self.experts + self.attention + self.again
    return products + self.between + self.loops

  @property
  def step(self) -> float:
    """All one after the other, but what is hidden."""
    return self.compute + self.parameters - self.hidden + self.rows + self.update


class Plan(NamedTuple):
  """The answer for one strategy."""

  question: Question
  strategy: str
  memory: memory.Memory
  exchanges: list[Exchange]
  times: Times
  note: str

  @property
  def fits(self) -> bool:
    return self.memory.peak <= USABLE * self.question.topology.hbm


_state = functools.lru_cache(maxsize=8)(memory.state_of)


def state_of(run: Run) -> Any:
  """Shapes of a run's state, the same for every batch."""
  return _state(work.with_batch(run, 1))


def ranked(question: Question) -> list[Plan]:
  """Plans of every strategy, on this mesh and on those with another expert axis.

  Those that fit come first, and of them the fastest.
  """
  found = [plan(q, name) for q in neighbours(question) for name in possible(q)]
  return sorted(found, key=lambda p: (not p.fits, p.times.step))


def refusal(question: Question, strategy: str) -> str:
  """Why a strategy cannot serve, and what can."""
  why = "is not known" if strategy not in exchanges.STRATEGIES else "needs expert > 1"
  if strategy in (known := refusals(question)):
    why = f"cannot serve: {known[strategy]}"
  names = possible(question)
  use = "leave it out" if names == [LOCAL] else f"use one of {', '.join(names)}"
  return f"--strategy {strategy} {why}; {use}."


def possible(question: Question) -> list[str]:
  """Names of strategies that have a meaning on this mesh."""
  if question.mesh.expert == 1:
    return [LOCAL]
  layer = _layer(question)
  if layer is None:
    return [LOCAL]
  return [
    name
    for name, strategy in exchanges.STRATEGIES.items()
    if not isinstance(strategy(layer), str)
  ]


def refusals(question: Question) -> dict[str, str]:
  """Why strategies have no meaning on this mesh, by name; none without expert axis."""
  layer, found = _layer(question), {}
  if layer is not None and question.mesh.expert > 1:
    for name, strategy in exchanges.STRATEGIES.items():
      if isinstance(why := strategy(layer), str):
        found[name] = why
  return found


def plan(question: Question, strategy: str) -> Plan:
  """The plan of one strategy."""
  run, mesh, topology = question.run, question.mesh, question.topology
  outcome = outcome_of(question, strategy)
  state = state_of(run)
  parameters = dense.of_parameters(run, mesh, state.params)
  rows = dense.of_activations(run, mesh) + (outcome.exchanges if outcome else [])
  hidden = [e for e in rows if e.what.startswith("experts")]
  rows = [e for e in rows if e not in hidden]
  used = memory.of(run, mesh, topology, state, outcome)
  times = _times(question, outcome, used, parameters + hidden, rows)
  note = outcome.note if outcome else "no sparse layer"
  return Plan(question, strategy, used, parameters + hidden + rows, times, note)


def outcome_of(question: Question, strategy: str) -> Outcome | None:
  """What a strategy does to a step; None of a dense model."""
  layer = _layer(question)
  if layer is None:
    return None
  if strategy == LOCAL:
    buckets = layer.config.capacity is not None
    rows = layer.slots if buckets else 1.0
    return Outcome([], rows, 0.0, 1, filled=layer.filled(1, whole=buckets))
  found = exchanges.STRATEGIES[strategy](layer)
  assert not isinstance(found, str), found
  return found


def _layer(question: Question) -> exchanges.Layer | None:
  extents = topologies.extents(question.topology, question.mesh.sizes)
  return exchanges.layer_of(
    question.run,
    question.mesh,
    extents["expert"].inside,
    factor=question.factor,
    skew=question.skew,
    chip=question.topology.chip,
    hosts=question.topology.sides[0],
  )


def seconds(question: Question, exchange: Exchange) -> float:
  """Time of a collective's calls in a step."""
  axis, _, part = exchange.axis.partition(" ")
  extent = topologies.extents(question.topology, question.mesh.sizes)[axis]
  if part == "(inside)":
    extent = dataclasses.replace(extent, size=extent.inside)
  elif part == "(between)":
    extent = dataclasses.replace(extent, size=extent.size // extent.inside, inside=1)
  return topologies.seconds(
    question.topology, extent, exchange.collective, exchange.size, exchange.count
  )


def _times(
  question: Question,
  outcome: Outcome | None,
  used: memory.Memory,
  parameters: list[Exchange],
  rows: list[Exchange],
) -> Times:
  run, mesh, topology = question.run, question.mesh, question.topology
  reached = rates.rates(topology.chip)
  flops = work.of(run)
  device = topology.flops * mesh.devices
  ff = work.one_sparse(run.model)
  share, pace, copied = reached.product, 1.0, 0.0
  if ff is not None and outcome is not None:
    share = rates.grouped(ff.d_model, work.expert_width(ff) // mesh.tensor)
    pace, copied = outcome.rows * outcome.filled, outcome.copied
  mixed = flops.useful / (
    flops.products / reached.product
    + flops.experts * pace / share
    + flops.attention / reached.attention
  )
  hbm = topology.chip.hbm_bandwidth / topology.chip.devices * reached.memory
  # With a mask, which a job's rows of documents have, cuDNN's output is made anew in
  # the backward pass, whatever blocks keep.
  masked = topology.chip.kind == "gpu" and jnp.dtype(run.model.dtype).itemsize == 2
  attention = flops.attention / device / reached.attention
  tokens = run.data.batch * run.data.seq / (mesh.rows * mesh.context)
  array = tokens * run.model.d_model * jnp.dtype(run.model.dtype).itemsize
  times = Times(
    products=flops.products / device / reached.product,
    experts=flops.experts * pace / device / share,
    attention=attention * (4 / 3 if masked else 1),
    again=flops.again / device / mixed,
    between=run.model.num_layers * rates.PASSES * array / hbm,
    loops=_looped(question, used, hbm),
    # Read and written once, and gradients read.
    update=(2 * (used.parameters + used.optimizer) + used.gradients) / hbm,
    parameters=sum(seconds(question, e) for e in parameters),
    hidden=0.0,
    rows=sum(_waited(question, e, used.looped) for e in rows) + copied / hbm,
  )
  share = reached.hidden + used.looped * (reached.in_loops - reached.hidden)
  return times._replace(hidden=share * min(times.compute, times.parameters))


def _waited(question: Question, exchange: Exchange, looped: float) -> float:
  """Seconds for an exchange of rows, of which a part of the layers is in loops.

  A device's own rows first gain by their permutations where layers are apart, and lose
  as much in a loop, by one pair of steps: OLMoE's over two H200s took 359 ms for 367,
  and 412 for 403.
  """
  twice = 1 + looped if exchange.collective == "permute" else 1.0
  return twice * seconds(question, exchange)


def _looped(question: Question, used: memory.Memory, hbm: float) -> float:
  """Seconds of copies that loops over layers cost, by the compiler for H200s.

  What blocks keep and their gradients begin as stacks of zeros.  The backward pass
  copies what a layer kept, and its parameters, out of theirs; kernels write straight
  into them, and other copies are made beside products.  Parameters are turned once.
  """
  if question.topology.chip.kind != "gpu":
    return 0.0
  return (used.looped * 3 * (used.kept + used.parameters) + 2 * used.turned) / hbm


def drop_probability(question: Question) -> tuple[float, int, int] | None:
  """(fraction of assignments dropped, slots of an expert, tokens that compete).

  At the capacity of the model, or of a model without one at `question.factor`; None of
  a model without sparse layers of token choice.
  """
  ff = work.one_sparse(question.run.model)
  if ff is None or ff.k is None:
    return None
  run, mesh = question.run, question.mesh
  tokens = run.data.batch * run.data.seq // (mesh.rows * mesh.context)
  if ff.group_size == "row":
    tokens = run.data.seq
  elif isinstance(ff.group_size, int):
    tokens = ff.group_size
  chance_E = drops.popularity(ff.num_experts, ff.k, question.skew)
  slots = work.slots(ff, tokens, question.factor)
  return drops.dropped(tokens, chance_E, slots), slots, tokens


def largest_batch(question: Question, strategy: str) -> int:
  """Rows of the largest batch that fits, a multiple of what divides rows; 0: none."""
  step = question.mesh.rows

  def fits(times: int) -> bool:
    run = work.with_batch(question.run, times * step)
    return plan(dataclasses.replace(question, run=run), strategy).fits

  if not fits(1):
    return 0
  low, high = 1, 2
  while fits(high) and high < 2**16:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low * step


def neighbours(question: Question) -> list[Question]:
  """The same on meshes with other expert axes, out of fsdp or data."""
  ff = work.one_sparse(question.run.model)
  if ff is None:
    return [question]
  mesh, found = question.mesh, {question.mesh: question}
  for axis in ("fsdp", "data"):
    pool = getattr(mesh, axis) * mesh.expert
    for expert in range(1, pool + 1):
      if pool % expert or ff.num_experts % expert:
        continue
      other = dataclasses.replace(mesh, expert=expert, **{axis: pool // expert})
      found.setdefault(other, dataclasses.replace(question, mesh=other))
  return list(found.values())
