"""What sparse layers send between devices, by strategy.

Every strategy is a function of a `Layer` that returns its collectives and what it does
to the work of a device; `STRATEGIES` is the table.  What is sent is counted in
`jmoe.parallel.costs`, where layers that choose for themselves count it too; how many
devices a token goes to, and what the busiest one gets, follow from the skew.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments.config import Run
from experiments.planning import drops, rates, work
from experiments.planning.chips import Chip
from experiments.planning.mesh import Mesh
from jmoe.config import MoEConfig
from jmoe.parallel import costs


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
  every_slot: bool = True  # whether rows of nobody are written and multiplied: on TPUs
  popularity: Any = None  # of the experts, f32[E] that sum to k; None: by the skew
  tile: int = 1  # rows that an expert's are filled up to a multiple of
  waited: float = 0.0  # rows in whose time an expert's matrices come
  copies: bool = False  # whether permutations may go by copy engines: GPUs of one host

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
    if self.popularity is not None:
      return self.popularity
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

  @property
  def room(self) -> float:
    """Rows that a dropless buffer holds, over a device's share: all that could come."""
    share = 1.0 if self.config.max_rows is None else self.config.max_rows
    return max(1.0, share * self.devices)

  def filled(self, devices: int, *, whole: bool = False) -> float:
    """Rows with those that an expert costs beside its own, over the mean.

    Half of a last tile is empty, and matrices are waited for; not where no row came.

    Args:
      devices: that bring their rows to an expert's one device.
      whole: its tiles are full, as of buckets.
    """
    rows = self.tokens * self.k * devices / self.config.num_experts
    full = whole or self.tile == 1
    empty = 0.0 if full else max(self.tile / 2, self.tile - rows)
    return 1 - math.expm1(-rows) * (empty + self.waited) / rows

  def copied(self, name: str, rows: float) -> float:
    """Bytes that memory moves for a strategy's exchanges, of all layers in a step.

    Args:
      name: of the strategy, in `rates.COPIES`.
      rows: bytes of the rows that are exchanged, once.
    """
    again = 1.25 if self.again else 1.0  # one of four exchanges is made again
    return rates.COPIES[name] * rows * again * self.repeat

  def sizes(self, **known: Any) -> costs.Sizes:
    """As the cost functions of strategies take them."""
    return costs.Sizes(
      self.tokens,
      self.k,
      self.config.d_model,
      self.itemsize,
      self.devices,
      self.inside,
      self.factor,
      **known,
    )

  def sent(self, found: Sequence[costs.Sent], axis: str = "expert") -> list[Exchange]:
    """Of all layers in a step."""
    exchanges = []
    for s in found:
      calls = (s.calls + s.again * self.again) * self.repeat
      where = f"{axis} ({s.part})" if s.part else axis
      exchanges.append(Exchange(s.what, s.collective, where, calls, calls * s.size))
    return exchanges


class Outcome(NamedTuple):
  """What a strategy does to a step."""

  exchanges: list[Exchange]
  rows: float  # that a device multiplies, over its share of all
  buffer: float  # bytes beside the layer's own while it runs
  own: int  # over how many devices experts are divided while they multiply
  note: str = ""
  room: float | None = None  # rows that buffers hold, over its share; None: as `rows`
  copied: float = 0.0  # bytes that memory moves for its exchanges, all layers together
  filled: float = 1.0  # rows with those that tiles and matrices cost (`Layer.filled`)


Strategy = Callable[[Layer], Outcome | str]  # or why there is none


def gather(layer: Layer) -> Outcome | str:
  """Experts come to the tokens: each device gathers the matrices of a whole layer."""
  come = layer.matrices * min(layer.stored, layer.itemsize)
  found = costs.gathered(come, layer.matrices * layer.stored, layer.devices)
  return Outcome(layer.sent(found), rows=1.0, buffer=0.0, own=1, filled=layer.filled(1))


def all_gather(layer: Layer) -> Outcome | str:
  """Every device sees all tokens, runs its experts, and sums are scattered."""
  sizes, nobody = layer.sizes(), layer.every_slot
  return Outcome(
    layer.sent(costs.all_gather(sizes)),
    rows=drops.busiest(layer.chance_E, layer.devices),
    buffer=2 * sizes.token * (layer.devices - 1),
    own=layer.devices,
    room=layer.room,
    copied=nobody * layer.copied("all_gather", layer.rows_out * (layer.devices - 1)),
    filled=layer.filled(layer.devices),
  )


def all_to_all(layer: Layer) -> Outcome | str:
  """Equal slots of every expert are exchanged; what finds none is dropped."""
  return Outcome(
    layer.sent(costs.all_to_all(layer.sizes())),
    rows=layer.factor,  # empty slots come from everywhere, and are multiplied too
    buffer=2 * layer.factor * layer.rows_out,
    own=layer.devices,
    note=f"buckets of factor {layer.factor:g}",
    copied=layer.copied("all_to_all", layer.factor * layer.rows_out),
    filled=layer.filled(layer.devices, whole=True),
  )


def ragged_all_to_all(layer: Layer) -> Outcome | str:
  """Only the rows that are chosen; the device that gets most sets the pace."""
  busiest = drops.busiest(layer.chance_E, layer.devices)
  return Outcome(
    layer.sent(costs.ragged_all_to_all(layer.sizes(busiest=busiest))),
    rows=busiest,
    buffer=2 * layer.room * layer.rows_out,
    own=layer.devices,
    room=layer.room,
    note=f"busiest device {busiest:.2f} of the mean",
    copied=layer.copied("ragged_all_to_all", busiest * layer.rows_out),
    filled=layer.filled(layer.devices),
  )


def hierarchical(layer: Layer) -> Outcome | str:
  """Inside a host first, then between hosts in messages that many times larger."""
  if not 1 < layer.inside < layer.devices:
    return "the expert axis lies within one host or slice"
  return Outcome(
    layer.sent(costs.hierarchical(layer.sizes())),
    rows=layer.factor,
    buffer=3 * layer.factor * layer.rows_out,
    own=layer.devices,
    note=f"buckets of factor {layer.factor:g}",
    copied=layer.copied("hierarchical", layer.factor * layer.rows_out),
    filled=layer.filled(layer.devices, whole=True),
  )


def deduplicated(layer: Layer) -> Outcome | str:
  """A token once for each device that has any of its experts; one sum comes home."""
  n = layer.devices
  sent, busiest = drops.distinct(layer.chance_E, n), drops.busiest(layer.chance_E, n)
  sizes = layer.sizes(busiest=busiest, distinct=sent)
  return Outcome(
    layer.sent(costs.deduplicated(sizes)),
    rows=busiest,
    buffer=2 * n * sizes.token,
    own=n,
    room=layer.room,
    note=f"{sent:.2f} of {layer.k:g} rows a token are sent",
    copied=layer.copied("deduplicated", busiest * sent * sizes.token),
    filled=layer.filled(n),
  )


def expert_tensor(layer: Layer) -> Outcome | str:
  """Each expert over two devices of the axis, d_ff divided: rows go to both."""
  n = layer.devices
  width = work.expert_width(layer.config)
  if n % 2 or width % 2:
    return f"neither expert={n} nor d_ff={width} may be odd"
  # Each device has as many slots, for half of the hidden layer of twice the experts.
  sizes = layer.sizes()._replace(factor=2 * layer.factor)
  return Outcome(
    layer.sent(costs.all_to_all(sizes)),
    rows=layer.factor, buffer=4 * layer.factor * layer.rows_out, own=n,
    note=f"buckets of factor {layer.factor:g}, pairs of devices share experts",
    copied=layer.copied("all_to_all", 2 * layer.factor * layer.rows_out),
    filled=layer.filled(layer.devices, whole=True),
  )  # fmt: skip


def own_first(strategy: Strategy) -> Strategy:
  """A strategy with one's own rows in a buffer of their own, by permutations.

  They run behind products, whose times grow by what that saves but for NCCL's calls and
  copies: so it was over two and four H200s, within 3% of a time of `all_gather`'s and
  6% of `all_to_all`'s (root mean squares of 28 and 19).
  """

  def of(layer: Layer) -> Outcome | str:
    found = strategy(layer)
    if isinstance(found, str):
      return found
    if not layer.copies:
      return "it pays where copy engines carry it, between GPUs of one host"
    room = found.room
    if room is not None:  # of each of both buffers
      room = 1.0 + min(room, layer.devices - 1.0)
    return found._replace(
      exchanges=[e._replace(collective="permute") for e in found.exchanges],
      copied=0.0,
      room=room,
      filled=1 + 2 * (found.filled - 1),  # both buffers have last tiles, and wait
    )

  return of


STRATEGIES: dict[str, Strategy] = {
  "gather experts": gather,
  "all_gather": all_gather,
  "all_gather+own_first": own_first(all_gather),
  "all_to_all": all_to_all,
  "all_to_all+own_first": own_first(all_to_all),
  "ragged_all_to_all": ragged_all_to_all,
  "hierarchical": hierarchical,
  "deduplicated": deduplicated,
  "expert+tensor": expert_tensor,
}


def layer_of(
  run: Run,
  mesh: Mesh,
  inside: int,
  *,
  factor: float,
  skew: float,
  chip: Chip,
  hosts: int = 1,
) -> Layer | None:
  """The sparse layer that a run has most of; None of a dense model.

  Args:
    run: the run.
    mesh: its mesh.
    inside: devices of the expert axis that share a host.
    factor: slots over mean rows, of a model without capacity.
    skew: of the question.
    chip: whose kernels run.
    hosts: of all devices, of GPUs.
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
    every_slot=chip.kind == "tpu",
    tile=rates.TILE if chip.kind == "gpu" else 1,
    waited=rates.waited(chip),
    copies=chip.kind == "gpu" and hosts == 1,
  )
