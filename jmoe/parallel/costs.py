"""What a sparse layer sends between devices, by strategy: pure functions of sizes.

One place, for `adaptive`, which chooses by it, and for planners of whole steps.  Bytes
are those that leave a device if each crosses one link: (n-1)/n of what an exchange
holds or a gather gives.  Rows go out and home, and their gradients the same way back; a
layer whose forward pass is made again for the backward pass sends out once more.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Sizes(NamedTuple):
  """Of a layer, on one of the n devices that its experts are divided over."""

  tokens: float
  k: float  # choices of a token
  d_model: int
  itemsize: int  # bytes of an activation
  devices: int
  inside: int = 1  # of them, how many share a node; 1: not known
  factor: float = 1.0  # slots over mean rows, of strategies with a capacity
  busiest: float = 1.0  # rows of the busiest device over the mean
  distinct: float | None = None  # devices that a token is sent to, on average

  @property
  def token(self) -> float:
    """Bytes of one row of all tokens."""
    return self.tokens * self.d_model * self.itemsize

  @property
  def away(self) -> float:
    """Share of what an exchange holds that leaves."""
    return (self.devices - 1) / self.devices

  @property
  def sent_to(self) -> float:
    """Devices that a token is sent to; of independent choices if nothing is known."""
    if self.distinct is not None:
      return self.distinct
    n = self.devices
    return n * (1 - (1 - 1 / n) ** self.k)


class Sent(NamedTuple):
  """A collective of a layer."""

  what: str
  collective: str
  size: float  # bytes that leave a device in a call
  calls: int  # in a forward and a backward pass
  again: int  # more of them where the forward pass is made again
  part: str = ""  # of the expert axis: "inside" nodes or "between" them

  def total(self, again: bool = False) -> float:
    """Bytes that leave a device in all calls."""
    return self.size * (self.calls + self.again * again)


def _rows(collective: str, size: float, part: str = "") -> Sent:
  """Out, home, and the gradients of both."""
  return Sent("rows to experts and home", collective, size, 4, 1, part)


def all_to_all(s: Sizes) -> list[Sent]:
  """Slots of every expert, empty or not."""
  return [_rows("all_to_all", s.factor * s.k * s.token * s.away)]


def ragged_all_to_all(s: Sizes) -> list[Sent]:
  """The rows that are chosen; the device that gets most sets the pace."""
  return [_rows("ragged_all_to_all", s.busiest * s.k * s.token * s.away)]


def deduplicated(s: Sizes) -> list[Sent]:
  """A token once for each device that has any of its experts; one sum comes home."""
  return [_rows("ragged_all_to_all", s.busiest * s.sent_to * s.token * s.away)]


def hierarchical(s: Sizes) -> list[Sent]:
  """Slots inside a node first, then between nodes."""
  outside = s.devices // s.inside
  size = s.factor * s.k * s.token
  return [
    _rows("all_to_all", size * (s.inside - 1) / s.inside, "inside"),
    _rows("all_to_all", size * (outside - 1) / outside, "between"),
  ]


def all_gather(s: Sizes) -> list[Sent]:
  """All tokens to all devices, and sums scattered; gradients the other way round."""
  size = s.token * (s.devices - 1)
  return [
    Sent("tokens", "all_gather", size, 2, 1),
    Sent("sums", "reduce_scatter", size, 2, 0),
  ]


STRATEGIES: dict[str, Callable[[Sizes], list[Sent]]] = {
  "all_gather": all_gather,
  "all_to_all": all_to_all,
  "ragged_all_to_all": ragged_all_to_all,
  "hierarchical": hierarchical,
  "deduplicated": deduplicated,
}


def gathered(used: float, stored: float, over: int) -> list[Sent]:
  """Matrices to the tokens, and their gradients home.

  Args:
    used: bytes of whole matrices as they come.
    stored: bytes of their gradients.
    over: devices that they are divided over.
  """
  part = (over - 1) / over
  return [
    Sent("experts", "all_gather", used * part, 1, 1),
    Sent("experts' gradients", "reduce_scatter", stored * part, 1, 0),
  ]


def seconds(
  sent: list[Sent],
  link: float,
  shares: Mapping[str, float],
  *,
  again: bool = False,
) -> float:
  """Of all calls, one after the other.

  Args:
    sent: collectives.
    link: bytes a second that leave a device.
    shares: collective -> the part of it that it reaches over as many devices; 1 where
      it is not listed.
    again: whether the forward pass is made again.
  """
  return sum(s.total(again) / (link * shares.get(s.collective, 1.0)) for s in sent)
