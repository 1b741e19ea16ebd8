"""Capacity buckets by gather: the same slots for every expert."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

from jax import Array

from jmoe.dispatch import carry
from jmoe.dispatch.layout import equal
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Plan, Rows
from jmoe.use import marked


@marked(dropless=False)
def buckets(
  x_TD: Array, plan: Plan, experts: Callable[[Rows], Array], home: Home
) -> Array:
  """What fits into an expert's slots runs; the rest is dropped.

  The same outcome as `einsum` without its `[T,E,C]` masks, as in Tutel's fast encode
  and decode (arXiv 2206.03382), but by gathers in both directions.

  Args:
    x_TD: activations.
    plan: with a capacity.
    experts: rows -> [R,D].
    home: how outputs come home.

  Returns:
    `[T,D]` or `[T,K,D]`; dropped assignments give zero.
  """
  layout = equal(plan, alignment=row_alignment(x_TD.dtype))
  return carry.through(x_TD, layout, experts, home)
