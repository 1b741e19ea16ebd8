"""What a feed-forward on Hopper is made of, is given, and keeps."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any, NamedTuple

from jax import Array

from jmoe.kernels import permute_rows
from jmoe.kernels.grouped_ffn.hopper_kernels import Activation
from jmoe.kernels.hopper import BLOCK
from jmoe.types import pytree, static


@dataclasses.dataclass(frozen=True)
class Form:
  """What is static about a feed-forward.

  Args:
    activation: of `activations`; of the first hidden array, which the second one, if
      there is one, is multiplied with.
    keep: what the backward pass finds, of `api.KEEPS`.
    sums: give tokens, the sums of their rows; there must be a layout then.
    pieces: in how many the largest arrays are made, see `hopper.py`; more than one
      only with `sums`, not inside `shard_map`, and for widths of whole `DEPTH`s.
    num_sms: multiprocessors to use; None: all.
    travels: the gradient of x goes to other devices when it is made.
  """

  activation: Activation
  keep: str = "hidden"
  sums: bool = False
  pieces: int = 1
  num_sms: int | None = None
  travels: bool = False


class Buffer(NamedTuple):
  """Rows of all experts, or the tokens and where each goes.

  Args:
    x: tokens [T,D], or without a layout the rows [R,D], padding rows zero.
    layout: where each token goes, or None.
    groups: aligned to `hopper.BLOCK`.
    weight_R: f32[R], or None for ones.
  """

  x: Any
  layout: Any
  groups: Any
  weight_R: Any


@pytree
class Given:
  """A buffer and the matrices, or what came of them."""

  x: Any
  layout: Any
  groups: Any
  weight_R: Any
  ups: Any
  down: Any

  def rows(self) -> Array:
    """`[R,D]` in the experts' order."""
    if self.layout is None:
      return self.x
    return permute_rows.spread(self.x, self.layout, block=BLOCK)


@pytree
class Kept:
  """What the backward pass finds, of each buffer."""

  given: tuple[Given, ...]
  rows: tuple[Array, ...]  # [R,D]; none if they are made anew
  hidden: tuple[tuple[Array, ...], ...]  # [R,F]; none of each if they are made anew
  # Whether the gradient of a matrix, and of its bias, is needed: of each in turn.
  ups_learn: tuple[tuple[bool, bool], ...] = static(default=())
  down_learns: tuple[bool, bool] = static(default=(True, True))
