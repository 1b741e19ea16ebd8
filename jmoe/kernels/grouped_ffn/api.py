"""The fused form where there is one, its parts otherwise."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jmoe.kernels.devices import current_device
from jmoe.kernels.grouped_ffn import activations
from jmoe.kernels.grouped_ffn.blocks import ffn
from jmoe.kernels.grouped_ffn.reference import Matrix, reference
from jmoe.kernels.grouped_matmul import grouped_matmul
from jmoe.kernels.grouped_matmul.api import (
  common,
  first,
  of_first,
  report_choice,
)
from jmoe.kernels.varying import differs, together
from jmoe.types import Rows
from jmoe.use import Use, fact, nearest

KEEPS = ("rows", "hidden", "inputs")


def grouped_ffn(
  rows: Rows,
  ups: tuple[Matrix, ...],
  down: Matrix,
  hidden: Callable[..., Array],
  matmul: Callable[..., Array] | None = None,
  *,
  keep: str = "hidden",
) -> Array:
  """`weight (hidden(x up_0 + b_0, x up_1 + b_1, ...) down + c)` of each row's expert.

  Args:
    rows: R rows grouped by expert, or the tokens and where each goes.
    ups: matrices [E,D,F] into the hidden layer, each with a bias [E,F] or None.
    down: matrix [E,F,D] out of it, with a bias [E,D] or None.
    hidden: elementwise, from as many [.,F] arrays as there are `ups` to one whose width
      `down` takes; compared by value as a static argument.
    matmul: a grouped matmul to compose instead of fusing; None chooses by device.
    keep: what stays in memory for the backward pass beside the tokens and the matrices:
      "rows" [R,D] and the hidden arrays [R,F], "hidden" those arrays alone (rows are
      gathered anew; only the fused form on Hopper can, others keep the rows), or
      "inputs": neither, all of it is computed anew.

  Returns:
    `[R,D]` in x's dtype; rows of no expert hold no meaning.  Their gradient must be
    zero, as `carry.home` makes it.

  Raises:
    ValueError: an unknown `keep`.
  """
  check_keep(keep)
  E = down[0].shape[0]
  groups, weight_R = first(rows.groups, E), rows.weight
  if weight_R is not None:
    weight_R = of_first(weight_R, rows.groups, E)
    rows = dataclasses.replace(rows, weight=weight_R)
  name = "given"
  if matmul is None:
    varies = differs(rows, ups, down)
    kind = common(rows.x, down[0])
    name = report_choice(current_device(), groups, E, kind, varies)
  if name == "hopper" and (activation := _in_registers(hidden, ups)):
    from jmoe.kernels.grouped_ffn.hopper import Form, fused_ffn  # Pallas

    x, layout = rows.x, rows.layout
    if rows.scale is not None or groups is not rows.groups:
      x, layout = of_first(rows.gathered(), rows.groups, E), None
    arrays = together(x, layout, ups, down, groups, weight_R)
    return fused_ffn(Form(activation, keep), *arrays)

  def plain(rows, ups, down) -> Any:
    x_RD = of_first(rows.gathered(), rows.groups, E)
    x_RD, ups, down, groups, weight_R = together(
      x_RD, ups, down, first(rows.groups, E), rows.weight
    )
    if name == "blocks":
      return ffn(hidden, x_RD, ups, down, groups, weight_R)
    return reference(
      x_RD, ups, down, groups, hidden, matmul or grouped_matmul, weight_R
    )

  call = jax.checkpoint(plain) if keep == "inputs" else plain
  return call(rows, ups, down)


def check_keep(keep: Any) -> None:
  """Raises unless it is one of `KEEPS`."""
  if keep not in KEEPS:
    raise ValueError(f"experts: keep={keep!r}; {nearest(str(keep), KEEPS)}")


def _in_registers(hidden: Any, ups: tuple[Matrix, ...]) -> Any:
  """The activation, if a kernel can compute it: of one array, or of a gated unit."""
  if len(ups) == 1:
    return activations.of(hidden)
  if not isinstance(hidden, Use) or not fact(hidden, "gated", False):
    return None
  return activations.of(hidden.kwargs.get("activation"))
