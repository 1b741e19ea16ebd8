"""The same from grouped matmuls: what every fused form must equal."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

from jax import Array

from jmoe.keeping import named
from jmoe.types import Groups

Matrix = tuple[Array, Array | None]  # weights and their bias, per expert


def reference(
  x_RD: Array,
  ups: tuple[Matrix, ...],
  down: Matrix,
  groups: Groups,
  hidden: Callable[..., Array],
  matmul: Callable[..., Array],
) -> Array:
  """`hidden(x up_0 + b_0, x up_1 + b_1, ...) down + c`, matmul by matmul."""
  hs_RF = named([matmul(x_RD, w_EDF, groups, b_EF) for w_EDF, b_EF in ups], "hidden")
  return matmul(hidden(*hs_RF), down[0], groups, down[1])
