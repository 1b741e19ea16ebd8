"""What sparse layers send between devices, by strategy.

Every strategy is a function of a `Layer` that returns its collectives and what it does
to the work of a device; `STRATEGIES` is the table.  Bytes are those that leave a device
(see `topology.seconds`).  A layer sends rows out and home, and their gradients back the
same way; a block that keeps its input alone sends them out once more.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from experiments.config import Run
from experiments.planning import drops, work
from experiments.planning.mesh import Mesh
from jmoe.config import MoEConfig


class Exchange(NamedTuple):
  """One collective of a step, all layers together."""

  what: str
  collective: str
  axis: str
  count: int  # calls on a device
  size: float  # bytes that leave a device, in all calls


@dataclasses.dataclass(frozen=True)
class Layer:
  """A sparse layer of a run on a mesh, as strategies see it; sizes of one device."""

  config: MoEConfig
  repeat: int  # layers
  tokens: int
  itemsize: int  # bytes of an activation
  stored: int  # bytes of a stored parameter
  again: bool  # whether the forward pass is made again
  devices: int  # of the expert axis
  inside: int  # of these, how many share a host
  tensor: int
  factor: float  # slots over mean rows, where there are buckets
  skew: float
  every_slot: bool = True  # whether empty slots are multiplied too, as on TPUs

  @property
  def slots(self) -> float:
    """Rows of buckets that are multiplied, over the mean."""
    return self.factor if self.every_slot else 1.0

  @property
  def k(self) -> float:
    return self.config.k or work.cost.experts_per_token(self.config)

  @property
  def chance_E(self):
    """Popularity of experts; routers that balance by themselves have none."""
    if self.config.k is None:
      return drops.popularity(self.config.num_experts, round(self.k), 0.0)
    return drops.popularity(self.config.num_experts, self.config.k, self.skew)

  @property
  def rows_out(self) -> float:
    """Bytes of the rows of all choices."""
    return self.tokens * self.k * self.config.d_model * self.itemsize

  @property
  def matrices(self) -> float:
    """Scalars of all experts."""
    return work.expert_params(self.config) / self.tensor

  def both_ways(self, collective: str, size: float, axis="expert") -> list[Exchange]:
    """Out, home, the gradients of both, and out again."""
    calls = 5 if self.again else 4
    what = "rows to experts and home"
    return [
      Exchange(what, collective, axis, calls * self.repeat, calls * self.repeat * size)
    ]


class Outcome(NamedTuple):
  """What a strategy does to a step."""

  exchanges: list[Exchange]
  rows: float  # that a device multiplies, over its share of all
  buffer: float  # bytes beside the layer's own while it runs
  own: int  # over how many devices experts are divided while they multiply
  note: str = ""


Strategy = Callable[[Layer], Outcome | str]  # or why there is none


def gather(layer: Layer) -> Outcome | str:
  """Experts come to the tokens: each device gathers the matrices of a whole layer."""
  n = layer.devices
  part = layer.matrices * (n - 1) / n
  come, go = part * min(layer.stored, layer.itemsize), part * layer.stored
  gathers = 2 if layer.again else 1
  return Outcome(
    [
      Exchange("experts", "all_gather", "expert", gathers * layer.repeat,
               gathers * layer.repeat * come),
      Exchange("experts' gradients", "reduce_scatter", "expert", layer.repeat,
               layer.repeat * go),
    ],
    rows=1.0, buffer=0.0, own=1,
  )  # fmt: skip


def all_gather(layer: Layer) -> Outcome | str:
  """Every device sees all tokens, runs its experts, and sums are scattered."""
  n = layer.devices
  size = layer.tokens * (n - 1) * layer.config.d_model * layer.itemsize
  gathers = 3 if layer.again else 2
  in_all, home = gathers * layer.repeat, 2 * layer.repeat
  return Outcome(
    [
      Exchange("tokens", "all_gather", "expert", in_all, in_all * size),
      Exchange("sums", "reduce_scatter", "expert", home, home * size),
    ],
    rows=drops.busiest(layer.chance_E, n),
    buffer=2 * size, own=n,
  )  # fmt: skip


def all_to_all(layer: Layer) -> Outcome | str:
  """Equal slots of every expert are exchanged; what finds none is dropped."""
  n = layer.devices
  size = layer.factor * layer.rows_out * (n - 1) / n
  return Outcome(
    layer.both_ways("all_to_all", size),
    rows=layer.slots, buffer=2 * layer.factor * layer.rows_out, own=n,
    note=f"buckets of factor {layer.factor:g}",
  )  # fmt: skip


def ragged_all_to_all(layer: Layer) -> Outcome | str:
  """Only the rows that are chosen; the device that gets most sets the pace."""
  n = layer.devices
  busiest = drops.busiest(layer.chance_E, n)
  size = busiest * layer.rows_out * (n - 1) / n
  return Outcome(
    layer.both_ways("ragged_all_to_all", size),
    rows=busiest, buffer=2 * busiest * layer.rows_out, own=n,
    note=f"busiest device {busiest:.2f} of the mean",
  )  # fmt: skip


def hierarchical(layer: Layer) -> Outcome | str:
  """Inside a host first, then between hosts in messages that many times larger."""
  n, inside = layer.devices, layer.inside
  if not 1 < inside < n:
    return "the expert axis lies within one host or slice"
  outside = n // inside
  size = layer.factor * layer.rows_out
  near = layer.both_ways("all_to_all", size * (inside - 1) / inside, "expert (inside)")
  far = layer.both_ways(
    "all_to_all", size * (outside - 1) / outside, "expert (between)"
  )
  return Outcome(
    near + far, rows=layer.slots, buffer=3 * size, own=n,
    note=f"buckets of factor {layer.factor:g}",
  )  # fmt: skip


def deduplicated(layer: Layer) -> Outcome | str:
  """A token once for each device that has any of its experts; one sum comes home."""
  n = layer.devices
  chance_E = layer.chance_E
  sent = drops.distinct(chance_E, n)
  busiest = drops.busiest(chance_E, n)
  size = layer.tokens * sent * layer.config.d_model * layer.itemsize
  return Outcome(
    layer.both_ways("all_to_all", busiest * size * (n - 1) / n),
    rows=busiest, buffer=2 * busiest * size, own=n,
    note=f"{sent:.2f} of {layer.k:g} rows a token are sent",
  )  # fmt: skip


def expert_tensor(layer: Layer) -> Outcome | str:
  """Each expert over two devices of the axis, d_ff divided: rows go to both."""
  n = layer.devices
  width = work.expert_width(layer.config)
  if n % 2 or width % 2:
    return f"neither expert={n} nor d_ff={width} may be odd"
  size = 2 * layer.factor * layer.rows_out * (n - 1) / n
  return Outcome(
    layer.both_ways("all_to_all", size),
    rows=layer.slots, buffer=4 * layer.factor * layer.rows_out, own=n,
    note=f"buckets of factor {layer.factor:g}, pairs of devices share experts",
  )  # fmt: skip


STRATEGIES: dict[str, Strategy] = {
  "gather experts": gather,
  "all_gather": all_gather,
  "all_to_all": all_to_all,
  "ragged_all_to_all": ragged_all_to_all,
  "hierarchical": hierarchical,
  "deduplicated": deduplicated,
  "expert+tensor": expert_tensor,
}


def layer_of(
  run: Run, mesh: Mesh, inside: int, *, factor: float, skew: float, kind: str
) -> Layer | None:
  """The sparse layer that a run has most of; None of a dense model.

  Args:
    run: the run.
    mesh: its mesh.
    inside: devices of the expert axis that share a host.
    factor: slots over mean rows, of a model without capacity.
    skew: of the question.
    kind: of chip.
  """
  found = work.sparse_blocks(run.model)
  if not found:
    return None
  config, _ = max(found, key=lambda pair: pair[1])
  tokens = run.data.batch * run.data.seq // (mesh.rows * mesh.context)
  if config.capacity is not None:
    mean = tokens * work.cost.experts_per_token(config) / config.num_experts
    factor = work.slots(config, tokens, factor) / mean
  return Layer(
    config,
    repeat=sum(n for _, n in found),
    tokens=tokens,
    itemsize=jnp.dtype(run.model.dtype).itemsize,
    stored=jnp.dtype(run.param_dtype).itemsize,
    again=run.model.remat is not False,
    devices=mesh.expert,
    inside=inside,
    tensor=mesh.tensor,
    factor=factor,
    skew=skew,
    every_slot=kind == "tpu",
  )
