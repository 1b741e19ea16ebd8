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
  weight_R: Array | None = None,
) -> Array:
  """`weight (hidden(x up_0 + b_0, x up_1 + b_1, ...) down + c)`, matmul by matmul."""
  hs_RF = named([matmul(x_RD, w_EDF, groups, b_EF) for w_EDF, b_EF in ups], "hidden")
  a_RF = hidden(*hs_RF)
  if weight_R is None:
    return matmul(a_RF, down[0], groups, down[1])
  if down[1] is None:  # so that its gradient needs no output
    return matmul(scaled(a_RF, weight_R), down[0], groups, None)
  return scaled(matmul(a_RF, down[0], groups, down[1]), weight_R)


def scaled(rows_RD: Array, weight_R: Array) -> Array:
  """Rows times a number each, rounded once, in the rows' dtype."""
  return (rows_RD.astype(weight_R.dtype) * weight_R[:, None]).astype(rows_RD.dtype)
