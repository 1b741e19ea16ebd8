"""A sparse layer over devices beside the same layer on one: what benchmarks measure."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

from experiments.planning import exchanges, rates, topology as topologies, work
from experiments.planning.topology import Extent, Topology


def share_of_one(layer: exchanges.Layer, strategy: str, topology: Topology) -> float:
  """A device's rate over that of the same dropless layer alone, with as many tokens.

  Args, errors: those of `seconds`.
  """
  alone, over = seconds(layer, strategy, topology)
  return alone / over


def seconds(
  layer: exchanges.Layer, strategy: str, topology: Topology
) -> tuple[float, float]:
  """(of the dropless layer alone on one device, of it over devices).

  Args:
    layer: one, forward and backward, nothing made again.
    strategy: of `exchanges.STRATEGIES`.
    topology: whose rates are taken; the expert axis lies over all of it.

  Raises:
    ValueError: the strategy cannot serve.
  """
  outcome = exchanges.STRATEGIES[strategy](layer)
  if isinstance(outcome, str):
    raise ValueError(f"{strategy} cannot serve: {outcome}.")
  config, reached = layer.config, rates.rates(topology.chip)
  flops = 3 * 2 * layer.tokens * layer.k * layer.matrices / config.num_experts
  share = rates.grouped(config.d_model, work.expert_width(config))
  once = flops / topology.flops / share
  extents = _extents(layer, topology)
  away = sum(
    topologies.seconds(topology, extents[e.axis], e.collective, e.size, e.count)
    for e in outcome.exchanges
  )
  away += outcome.copied / (topology.chip.hbm_bandwidth * reached.memory)
  return once * layer.filled(1), once * outcome.rows * outcome.filled + away


def _extents(layer: exchanges.Layer, topology: Topology) -> dict[str, Extent]:
  """Where exchanges go; a host may be taken for two nodes."""
  whole = topologies.extents(topology, {"expert": layer.devices})["expert"]
  near, nodes = layer.inside, layer.devices // layer.inside
  return {
    "expert": whole,
    "expert (inside)": dataclasses.replace(
      whole, size=near, inside=min(whole.inside, near)
    ),
    "expert (between)": dataclasses.replace(
      whole, size=nodes, inside=max(1, whole.inside // near)
    ),
  }
