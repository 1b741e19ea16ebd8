"""A sparse layer over devices beside the same layer on one: what benchmarks measure."""
# SPDX-License-Identifier: Apache-2.0

from experiments.planning import exchanges, rates, topology as topologies, work
from experiments.planning.topology import Topology


def share_of_one(layer: exchanges.Layer, strategy: str, topology: Topology) -> float:
  """A device's rate over that of the same dropless layer alone, with as many tokens.

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
  alone = flops / topology.flops / share
  extent = topologies.extents(topology, {"expert": layer.devices})["expert"]
  away = sum(
    topologies.seconds(topology, extent, e.collective, e.size, e.count)
    for e in outcome.exchanges
  )
  away += outcome.copied / (topology.chip.hbm_bandwidth * reached.memory)
  return alone / (alone * outcome.rows * outcome.filled + away)
