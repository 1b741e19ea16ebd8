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
_LARGE = 2**28  # bytes of rows from which on they are made in pieces


def grouped_ffn(
  rows: Rows | tuple[Rows, ...],
  ups: tuple[Matrix, ...],
  down: Matrix,
  hidden: Callable[..., Array],
  matmul: Callable[..., Array] | None = None,
  *,
  keep: str = "hidden",
  pieces: int | None = None,
) -> Any:
  """`weight (hidden(x up_0 + b_0, x up_1 + b_1, ...) down + c)` of each row's expert.

  Args:
    rows: R rows grouped by expert, or the tokens and where each goes; or several such
      buffers, those first that are there first.  On Hopper the gradient of a matrix is
      then one product over all of them; elsewhere it is a sum.
    ups: matrices [E,D,F] into the hidden layer, each with a bias [E,F] or None.
    down: matrix [E,F,D] out of it, with a bias [E,D] or None.
    hidden: elementwise, from as many [.,F] arrays as there are `ups` to one whose width
      `down` takes; compared by value as a static argument.
    matmul: a grouped matmul to compose instead of fusing; None chooses by device.
    keep: what stays in memory for the backward pass beside the tokens and the matrices:
      "rows" [R,D] and the hidden arrays [R,F], "hidden" those arrays alone (rows are
      gathered anew; only the fused form on Hopper can, others keep the rows), or
      "inputs": neither, all of it is computed anew.
    pieces: in how many the fused form on Hopper makes the arrays [R,D] and what goes
      into `down`, where `rows.sums`: fewer bytes at a time, a few launches more.  None
      takes two where that was seen to save memory (rows of 256 MiB or more, wider than
      the hidden arrays, more than E*D of them), and one inside `shard_map` or for
      several buffers, where more are refused; other forms have none.

  Returns:
    `[R,D]` in x's dtype; rows of no expert hold no meaning.  Their gradient must be
    zero, as `carry.home` makes it.  If `rows.sums`, the sums of each token's rows,
    `[T,D]`.  Of several buffers a tuple.

  Raises:
    ValueError: an unknown `keep`, or `pieces` that the fused form cannot make.
  """
  check_keep(keep)
  check_pieces(pieces)
  buffers = (rows,) if isinstance(rows, Rows) else tuple(rows)
  if any(one.sums and one.layout is None for one in buffers):
    raise ValueError("experts: rows.sums without a layout; give Rows(layout=...)")
  E = down[0].shape[0]
  buffers = tuple(_of_those(one, E) for one in buffers)
  name = "given"
  if matmul is None:
    varies = differs(buffers, ups, down)
    kind = common(buffers[0].x, down[0])
    groups = first(buffers[0].groups, E)
    name = report_choice(current_device(), groups, E, kind, varies)
  if name == "hopper" and (activation := _in_registers(hidden, ups)):
    made = _fused(activation, buffers, ups, down, keep, pieces)
  else:
    made = tuple(
      _composed(name, one, ups, down, hidden, matmul, keep) for one in buffers
    )
  return made[0] if isinstance(rows, Rows) else made


def _of_those(rows: Rows, num_experts: int) -> Rows:
  """With the weights of the first experts' rows, if there are more experts."""
  if rows.weight is None:
    return rows
  return dataclasses.replace(
    rows, weight=of_first(rows.weight, rows.groups, num_experts)
  )


def _fused(
  activation: Any,
  buffers: tuple[Rows, ...],
  ups: tuple[Matrix, ...],
  down: Matrix,
  keep: str,
  pieces: int | None,
) -> tuple[Array, ...]:
  """On Hopper; all buffers give sums, or all of them rows."""
  from jmoe.kernels.grouped_ffn.hopper import fused_ffn  # imports Pallas
  from jmoe.kernels.grouped_ffn.hopper_values import Buffer, Form

  E, given = down[0].shape[0], []
  for rows in buffers:
    groups = first(rows.groups, E)
    x, layout = rows.x, rows.layout
    if rows.scale is not None or groups is not rows.groups:
      x, layout = of_first(rows.gathered(), rows.groups, E), None
    given.append(Buffer(x, layout, groups, rows.weight))
  sums = buffers[0].sums and given[0].layout is not None
  pieces = _pieces(pieces, buffers, ups, down, whole=not sums)
  form = Form(activation, keep, sums, pieces, travels=buffers[0].travels)
  made: Any = fused_ffn(form, *together(tuple(given), ups, down))
  if sums:
    return made
  return tuple(_home(rows, y) for rows, y in zip(buffers, made, strict=True))


def _composed(
  name: str,
  rows: Rows,
  ups: tuple[Matrix, ...],
  down: Matrix,
  hidden: Callable[..., Array],
  matmul: Callable[..., Array] | None,
  keep: str,
) -> Array:
  """Grouped matmuls with the hidden function between them."""
  E = down[0].shape[0]

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
  return _home(rows, call(rows, ups, down))


def _home(rows: Rows, y_RD: Array) -> Array:
  """Rows, or if these ask for it the sums of each token's."""
  if not rows.sums:
    return y_RD
  from jmoe.dispatch import carry

  assert rows.layout is not None
  return carry.summed_home(y_RD, rows.layout)


def _pieces(
  given: int | None,
  buffers: tuple[Rows, ...],
  ups: tuple[Matrix, ...],
  down: Matrix,
  *,
  whole: bool,
) -> int:
  """How many; `whole` where the fused form gives rows, which are made at once."""
  F, D = down[0].shape[1:]
  rows, *others = buffers
  reason = None
  if whole:
    reason = "rows are asked for, not their sums per token; use pieces=1"
  elif differs(buffers, ups, down):
    reason = "inside shard_map they are made whole; use pieces=1"
  elif others:
    reason = "there are several buffers; use pieces=1"
  elif D % 64 or F % 64:
    reason = f"d_model={D} and d_ff={F} must be multiples of 64; use pieces=1"
  if given is None:
    return 2 if reason is None and _outweighs(rows, down) else 1
  most = max(min(D, F) // 128, 1)
  if reason is None and given > most:
    reason = f"d_model={D} and d_ff={F} have at most {most}"
  if reason is not None and given != 1:
    raise ValueError(f"experts: pieces={given}; {reason}")
  return given


def _outweighs(rows: Rows, down: Matrix) -> bool:
  """Whether rows are most of the memory, beside hidden arrays and gradients.

  With fewer rows than E*D a hidden array is smaller than a matrix's gradient, in whose
  place XLA puts it until that is made.
  """
  assert rows.layout is not None
  (E, F, D), R = down[0].shape, rows.layout.num_rows
  return D > F and R > E * D and R * D * rows.x.dtype.itemsize >= _LARGE


def check_keep(keep: Any) -> None:
  """Raises unless it is one of `KEEPS`."""
  if keep not in KEEPS:
    raise ValueError(f"experts: keep={keep!r}; {nearest(str(keep), KEEPS)}")


def check_pieces(pieces: int | None) -> None:
  """Raises unless it is None or positive."""
  if pieces is not None and pieces < 1:
    raise ValueError(f"experts: pieces={pieces!r}; give None or 1, 2, ...")


def _in_registers(hidden: Any, ups: tuple[Matrix, ...]) -> Any:
  """The activation, if a kernel can compute it: of one array, or of a gated unit."""
  if len(ups) == 1:
    return activations.of(hidden)
  if not isinstance(hidden, Use) or not fact(hidden, "gated", False):
    return None
  return activations.of(hidden.kwargs.get("activation"))
