"""The fused form where there is one, its parts otherwise."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

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
from jmoe.kernels.varying import axes_of, together
from jmoe.types import Groups
from jmoe.use import Use, fact


def grouped_ffn(
  x_RD: Array,
  ups: tuple[Matrix, ...],
  down: Matrix,
  groups: Groups,
  hidden: Callable[..., Array],
  matmul: Callable[..., Array] | None = None,
) -> Array:
  """`hidden(x up_0 + b_0, x up_1 + b_1, ...) down + c` with each row's own expert.

  Args:
    x_RD: rows grouped by expert, padding rows zero.
    ups: matrices [E,D,F] into the hidden layer, each with a bias [E,F] or None.
    down: matrix [E,F,D] out of it, with a bias [E,D] or None.
    groups: where each expert's rows are.
    hidden: elementwise, from as many [.,F] arrays as there are `ups` to one whose width
      `down` takes; compared by value as a static argument.
    matmul: a grouped matmul to compose instead of fusing; None chooses by device.

  Returns:
    `[R,D]` in x's dtype; rows of no expert hold no meaning.  Their gradient must be
    zero, as `carry.home` makes it.
  """
  E = down[0].shape[0]
  x_RD, groups = of_first(x_RD, groups, E), first(groups, E)
  x_RD, ups, down, groups = together(x_RD, ups, down, groups)
  if matmul is None:
    varies = bool(axes_of(x_RD))  # as they all do now
    name = report_choice(current_device(), groups, E, common(x_RD, down[0]), varies)
    if name == "blocks":
      return ffn(hidden, x_RD, ups, down, groups)
    if name == "hopper" and (activation := _in_registers(hidden, ups, down)):
      from jmoe.kernels.grouped_ffn.hopper import gated_ffn  # imports Pallas

      return gated_ffn(activation, x_RD, ups[0][0], ups[1][0], down[0], groups)
  return reference(x_RD, ups, down, groups, hidden, matmul or grouped_matmul)


def _in_registers(hidden: Any, ups: tuple[Matrix, ...], down: Matrix) -> Any:
  """The activation of a gated unit without biases, if a kernel can compute it."""
  if not isinstance(hidden, Use) or not fact(hidden, "gated", False):
    return None
  if any(bias is not None for _, bias in (*ups, down)):
    return None
  return activations.of(hidden.kwargs.get("activation"))
