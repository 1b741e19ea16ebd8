"""Dropless on one device: rows sorted by expert, ragged groups."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

from jax import Array

from jmoe.dispatch import carry
from jmoe.dispatch.layout import ragged
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Plan, Rows
from jmoe.use import marked


@marked(dropless=True)
def sort(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  block: int | None = None,
) -> Array:
  """Every assignment runs, unless a bounded buffer overflows.

  MegaBlocks (arXiv 2211.15841), with groups aligned to blocks of rows.

  Args:
    x_TD: activations.
    plan: dropless.
    experts: rows -> [R,D].
    home: how outputs come home.
    block: rows an expert's group is aligned to; None chooses.

  Returns:
    `[T,D]` or `[T,K,D]`.
  """
  mean = plan.order.shape[0] / plan.load.shape[1]
  layout = ragged(plan, block, alignment=row_alignment(x_TD.dtype, mean))
  return carry.through(x_TD, layout, experts, home)
