"""Which chips there are, and how they are wired: `v5e:16x16`, `gpu:4x8xH200`.

Devices are numbered along the torus, or host by host, last dimension fastest; the axes
of a mesh are laid over these numbers in order, the last one over neighbours.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
import re
from collections.abc import Mapping

from experiments.planning import rates
from experiments.planning.chips import CHIPS, Chip, chip as chip_of


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind: a torus of TPUs, or hosts of GPUs."""

  name: str
  chip: Chip
  sides: tuple[int, ...]  # of the torus; of GPUs: (hosts, GPUs of a host)

  @property
  def devices(self) -> int:
    """What a mesh is made of."""
    return math.prod(self.sides) * self.chip.devices

  @property
  def node(self) -> int:
    """Devices that fast links join: a host of GPUs, a whole slice of TPUs."""
    return self.sides[-1] if self.chip.kind == "gpu" else self.devices

  @property
  def flops(self) -> float:
    """Of a device, a second, at the peak."""
    return self.chip.flops / self.chip.devices

  @property
  def hbm(self) -> float:
    """Bytes of a device."""
    return self.chip.hbm / self.chip.devices


def parse(text: str) -> Topology:
  """The topology of a text.

  Raises:
    ValueError: on one line, what is wrong with it and what would do.
  """
  name, _, rest = text.strip().lower().partition(":")
  tpus = [known for known, chip in CHIPS.items() if chip.kind == "tpu"]
  gpus = [known for known, chip in CHIPS.items() if chip.kind == "gpu"]
  if name == "gpu" and (found := re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z]\w*)", rest)):
    hosts, count, which = int(found[1] or 1), int(found[2]), found[3]
    if which.lower() in (g.lower() for g in gpus) and hosts and count:
      return Topology(text, chip_of(which), (hosts, count))
  if name in tpus and re.fullmatch(r"\d+(x\d+)*", rest):
    sides = tuple(int(n) for n in rest.split("x"))
    dims = CHIPS[name].dims
    if len(sides) == dims and all(sides):
      return Topology(text, CHIPS[name], sides)
    if all(sides):
      raise ValueError(
        f"--topology {text}: {name} is a torus of {dims} dimensions; write "
        f"{name}:{'x'.join('ABC'[:dims])}, as in {name}:{'x'.join('4' * dims)}."
      )
  known = ", ".join(f"{n}:{'x'.join('ABC'[: CHIPS[n].dims])}" for n in tpus)
  raise ValueError(
    f"--topology {text}: unknown; use {known}, or gpu:NxCHIP or gpu:HOSTSxNxCHIP with "
    f"CHIP one of {', '.join(gpus)}."
  )


@dataclasses.dataclass(frozen=True)
class Extent:
  """Where a mesh axis lies."""

  size: int  # devices
  spans: tuple[tuple[int, bool], ...]  # of a torus: chips, whether ends are joined
  inside: int = 1  # of GPUs: how many of them share a host


def extents(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Extent]:
  """Where each axis of a mesh lies, by name.

  Args:
    topology: of as many devices as the product of sizes.
    sizes: of the axes, the slowest first.
  """
  if topology.chip.kind == "gpu":
    return _in_hosts(topology, sizes)
  left = [*topology.sides, topology.chip.devices]
  wrap = [side >= topology.chip.wraps_at for side in topology.sides] + [False]
  found = {}
  for axis, size in reversed(list(sizes.items())):
    rest, spans = size, []
    while rest > 1 and left:
      part = math.gcd(rest, left[-1])
      if part > 1:
        whole = (
          len(left) <= len(topology.sides) and part == topology.sides[len(left) - 1]
        )
        spans.append((part, whole and wrap[len(left) - 1]))
        rest, left[-1] = rest // part, left[-1] // part
      if left[-1] == 1:
        left.pop()
      elif part == 1:  # sizes that do not divide sides: as if in a line
        spans.append((rest, False))
        break
    found[axis] = Extent(size, tuple(spans))
  return {axis: found[axis] for axis in sizes}


def _in_hosts(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Extent]:
  found, stride = {}, 1
  for axis, size in reversed(list(sizes.items())):
    # A number that divides the axis, so that every host has as many.
    inside = math.gcd(size, max(1, topology.node // stride))
    found[axis] = Extent(size, (), inside)
    stride *= size
  return {axis: found[axis] for axis in sizes}


# Collectives of which every device sends something to every other one itself.
_TO_EACH = ("all_to_all", "ragged_all_to_all", "permute")


def seconds(
  topology: Topology, extent: Extent, collective: str, size: float, calls: int = 1
) -> float:
  """Time of the calls of a collective along one axis, by stated rates and `rates`.

  A torus: gathers go round in rings, both ways, in all dimensions of the axis at once;
  in an all_to_all a byte crosses a quarter of each ring on average, half of a line.
  Hosts: what stays inside goes by NVLink, the rest by the network, one after the other.
  A call costs something beside its bytes and for each other device; a device's own part
  may be copied too (`rates.Link`).

  Args:
    topology: the chips.
    extent: of the axis.
    collective: "all_to_all", "ragged_all_to_all", "permute" (a shift for each other
      device), "all_gather", "reduce_scatter", "all_reduce".
    size: bytes that leave a device in all calls if every byte crosses one link: (n-1)/n
      of what it gets in a gather, of what it holds in an all_to_all; twice that in an
      all_reduce.
    calls: how many there are.
  """
  if extent.size <= 1 or not size:
    return 0.0
  chip = topology.chip
  reached = rates.rates(chip)
  moving = _on_torus if chip.kind == "tpu" else _between_hosts
  link = reached.of(collective)
  others = extent.size - 1
  begun = calls * (link.call + others * link.further)
  own = link.own * size / others / chip.link
  return begun + size * moving(topology, extent, collective) / link.share + own


def _between_hosts(topology: Topology, extent: Extent, collective: str) -> float:
  """Seconds of a byte at the stated rates."""
  far = (extent.size - extent.inside) / (extent.size - 1)
  if collective not in _TO_EACH and far:
    far = 1.0 / extent.inside  # a ring leaves the host once for all of its GPUs
  near = 1 - far if extent.inside > 1 else 0.0
  return near / topology.chip.link + far / topology.chip.network


def _on_torus(topology: Topology, extent: Extent, collective: str) -> float:
  """Seconds of a byte at the stated rates; devices of a chip share its links."""
  chip, spans = topology.chip, extent.spans or ((extent.size, False),)
  link = chip.link / chip.devices
  if extent.size <= chip.devices:  # within a chip: as fast as all of its links at least
    return 1 / (chip.links * link)
  if collective in _TO_EACH:
    # Bytes on a link: half of the hops each way, a quarter of a ring or half of a line.
    return max(n / 8 if joined else n / 4 for n, joined in spans) / link
  return 1 / (sum(2 if joined else 1 for _, joined in spans) * link)
