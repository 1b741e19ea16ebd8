"""Which implementation serves which device; said once, and never a silent dense one."""
# SPDX-License-Identifier: Apache-2.0

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.kernels.devices import (
  current_device,
  unfit_for_hopper,
  unfit_for_megablox,
  unfit_for_triton,
)
from jmoe.kernels.grouped_matmul.blocks import blocks
from jmoe.kernels.grouped_matmul.xla import batched, ragged_dot
from jmoe.kernels.varying import axes_of, together
from jmoe.types import Groups
from jmoe.use import nearest

_log = logging.getLogger("jmoe")
_said: set[str] = set()


def _hopper(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  from jmoe.kernels.grouped_matmul.hopper import hopper  # imports Pallas

  return hopper(x_RD, w_EDF, groups, bias_EF)


def _triton(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  from jmoe.kernels.grouped_matmul.triton import triton  # imports Pallas

  return triton(x_RD, w_EDF, groups, bias_EF)


def _megablox(
  x_RD: Array, w_EDF: Array, groups: Groups, bias_EF: Array | None = None
) -> Array:
  from jmoe.kernels.grouped_matmul.megablox import megablox  # imports Pallas

  return megablox(x_RD, w_EDF, groups, bias_EF)


_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
  "blocks": blocks,
  "batched": batched,
  "ragged_dot": ragged_dot,
  "hopper": _hopper,
  "triton": _triton,
  "megablox": _megablox,
}


class _Row(NamedTuple):
  """An implementation, why it is chosen, and whether users should hear a warning."""

  name: str
  why: str
  slow: bool = False


_CHUNKS = _Row(
  "blocks", "a cuBLAS product a chunk of an expert's rows, loops run by the host", True
)
_BATCHED = _Row("batched", "one batched cuBLAS product")
_TRITON = _Row("triton", "Pallas Triton, only rows that exist")

# (device, equal groups) -> the first that can serve
_TABLE = {
  ("cpu", False): (_Row("blocks", "only rows that exist are multiplied"),),
  ("cpu", True): (_Row("blocks", "only slots that are taken are multiplied"),),
  ("hopper", False): (
    _Row("hopper", "warp-specialised, only rows that exist"),
    _TRITON,
    _CHUNKS,
  ),
  ("hopper", True): (
    _Row("hopper", "warp-specialised, only slots that are taken"),
    _TRITON,
    _BATCHED,
  ),
  ("ampere", False): (_TRITON, _CHUNKS),
  ("ampere", True): (_TRITON, _BATCHED),
  ("gpu", False): (_TRITON, _CHUNKS),
  ("gpu", True): (_BATCHED,),
  ("tpu", False): (
    _Row("megablox", "Pallas, only tiles that hold rows"),
    _Row("ragged_dot", "XLA groups it"),
    _Row("blocks", "only rows that exist, in loops", True),
  ),
  ("tpu", True): (_Row("batched", "one batched product"),),
}


def choose(
  device: str,
  groups: Groups,
  num_experts: int,
  dtype: Any = jnp.float32,
  *,
  varies: bool = False,
) -> tuple[str, str, bool]:
  """The implementation for a device, the reason, and whether it is a slow one.

  Args:
    device: one of `devices.DEVICES`.
    groups: only its static fields are read.
    num_experts: matrices.
    dtype: of rows and matrices.
    varies: the arrays differ over axes of a mesh, inside `jax.shard_map`.

  Returns:
    Name, reason, and True if the choice deserves a warning.
  """
  equal = groups.capacity is not None
  if equal and num_experts == 1:
    return "batched", "one expert is a plain product", False
  if equal and groups.block == 1:  # every slot is computed anyway (einsum, mix)
    return "batched", "one batched product", False
  rows = _TABLE.get((device, equal), _TABLE["gpu", equal])
  reasons = []
  for chosen in rows:
    unfit = _unfit(chosen.name, device, dtype, groups.block, varies)
    if unfit is None:
      break
    reasons.append(unfit)
  return chosen.name, "; ".join([chosen.why, *reasons]), chosen.slow


def _unfit(name: str, device: str, dtype: Any, block: int, varies: bool) -> str | None:
  """Why an implementation cannot serve, if it cannot."""
  if name == "hopper":
    return unfit_for_hopper(dtype, block) if device == name else f"this is no {name}"
  if name == "triton":
    if device not in ("ampere", "hopper"):
      return "this is no NVIDIA GPU of compute capability 8.0 or more"
    return unfit_for_triton(dtype, block)
  if name == "megablox":
    if device != "tpu":
      return "this is no TPU"
    # Their results do not say over which axes they differ, and jax checks that.
    if varies:
      return "megablox has no part in shard_map's checks"
    return unfit_for_megablox(dtype, block)
  # Before 0.12 the gradient of ragged_dot's matrices is dense on TPU: E times the work.
  if name == "ragged_dot" and device == "tpu" and jax.__version_info__ < (0, 12):
    return f"jax {jax.__version__} has a dense weight gradient in ragged_dot"
  return None


def first(groups: Groups, num_experts: int) -> Groups:
  """The groups of the first experts only."""
  if groups.start.shape[0] <= num_experts:
    return groups
  start, rows = groups.start[:num_experts], groups.rows[:num_experts]
  return Groups(start, rows, groups.block, groups.capacity)


def of_first(x_RD: Array, groups: Groups, num_experts: int) -> Array:
  """The rows, or numbers of rows, with zeros for those of experts after the first ones.

  A kernel for the first experts may leave the others' rows unwritten, in the gradient
  too: what is not used has a gradient of zero.
  """
  if groups.start.shape[0] <= num_experts:
    return x_RD
  row_R = jnp.arange(x_RD.shape[0], dtype=jnp.int32)
  ours_R = row_R < groups.start[num_experts]
  return jnp.where(ours_R.reshape(-1, *[1] * (x_RD.ndim - 1)), x_RD, 0)


def common(*arrays: Array) -> Any:
  """The dtype of all arrays; the widest where they differ."""
  return np.result_type(*(x.dtype for x in arrays))


def grouped_matmul(
  x_RD: Array,
  w_EDF: Array,
  groups: Groups,
  bias_EF: Array | None = None,
  *,
  implementation: str | None = None,
  allow_dense: bool = False,
) -> Array:
  """Rows of expert e times matrix e, plus bias e.

  Args:
    x_RD: rows grouped by expert, padding rows zero.
    w_EDF: a matrix per expert; may be of the first experts of `groups` only.
    groups: where each expert's rows are.
    bias_EF: a bias per expert.
    implementation: "blocks", "batched" (equal groups), "hopper", "triton", "megablox",
      "ragged_dot"; None chooses by device, and says so once in the log "jmoe".
    allow_dense: accept an implementation known to multiply every row by every matrix.

  Returns:
    `[R,F]` in x's dtype, sums in at least float32; rows of no expert hold no meaning.

  Raises:
    ValueError: an unknown implementation, one that does not fit, or a dense one that
      was not asked for.
  """
  device, E = current_device(), w_EDF.shape[0]
  dtype, varies = common(x_RD, w_EDF), bool(axes_of((x_RD, w_EDF, groups)))
  x_RD, groups = of_first(x_RD, groups, E), first(groups, E)
  if implementation is None:
    implementation = report_choice(device, groups, E, dtype, varies)
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"grouped_matmul: implementation={implementation!r}; "
      f"{nearest(implementation, _IMPLEMENTATIONS)}"
    )
  if implementation == "batched" and groups.capacity is None:
    raise ValueError(
      "grouped_matmul: implementation='batched' needs equal groups (a capacity); "
      "use 'blocks'."
    )
  unfit = None
  if implementation != "ragged_dot":
    unfit = _unfit(implementation, device, dtype, groups.block, varies)
  if unfit:
    raise ValueError(
      f"grouped_matmul: implementation={implementation!r} cannot serve, {unfit}; use "
      "None to choose by device."
    )
  if implementation == "ragged_dot" and device != "tpu" and not allow_dense:
    raise ValueError(
      f"grouped_matmul: implementation='ragged_dot' on {device} multiplies every row "
      f"by all {E} matrices; use 'blocks', or pass allow_dense=True."
    )
  return _IMPLEMENTATIONS[implementation](*together(x_RD, w_EDF, groups, bias_EF))


def report_choice(
  device: str, groups: Groups, num_experts: int, dtype: Any, varies: bool
) -> str:
  """`choose`, said once per device and reason in the log "jmoe"."""
  name, why, slow = choose(device, groups, num_experts, dtype, varies=varies)
  message = f"grouped matmul on {device}: {name} ({why})"
  if message not in _said:
    _said.add(message)
    _log.log(logging.WARNING if slow else logging.INFO, message)
  return name
