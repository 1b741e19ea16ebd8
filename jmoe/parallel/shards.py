"""What the code inside a layer's own `shard_map` knows about it."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any


class Shards(tuple):
  """The mesh axes that split the tokens of one call, and what else is split.

  A tuple of names, so that it goes wherever mesh `axes` go; losses that see it pool
  over the whole call rather than over a shard.
  """

  rows: tuple[str, ...]  # of these, axes that split rows of a context without `row`
  experts: tuple[str, ...]  # over which a dispatch strategy exchanges rows
  features: tuple[str, ...]  # over which parts of hidden layers are summed
  placement: tuple[int, ...] | None  # the expert of each slot, if some are there twice

  def __new__(cls, tokens: tuple[str, ...] = (), **_: Any) -> "Shards":
    return super().__new__(cls, tokens)

  def __init__(
    self,
    tokens: tuple[str, ...] = (),
    *,
    rows: tuple[str, ...] = (),
    experts: tuple[str, ...] = (),
    features: tuple[str, ...] = (),
    placement: tuple[int, ...] | None = None,
  ):
    del tokens
    self.rows, self.experts = rows, experts
    self.features, self.placement = features, placement
