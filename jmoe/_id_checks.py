"""Whether ids name something that there is, as far as they can be read without tracing.

Under `jit` they cannot: there an id out of range is counted as dropped by restriction.
"""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from jmoe.types import Context, num_groups
from jmoe.use import fact


def call(config: Any, context: Context, forced: Array | None, T: int) -> None:
  """Raises for the first id that a stage reads and that is out of range.

  Args:
    config: a `MoEConfig`.
    context: of the call, complete; what padding holds is not read.
    forced: recorded choices, of the right shape.
    T: tokens of the call.
  """
  valid, table = context.valid, context.table
  if fact(config.router, "table") and table is not None and forced is None:
    within("context.token_id", context.token_id, table.shape[-1], valid=valid)
    within("context.table", table, config.num_experts)
    if table.ndim == 2:
      within("context.layer", context.layer, table.shape[0])
  if any(loss.kwargs.get("over") == "sequence" for loss in config.losses):
    within("context.row", context.row, context.num_rows, valid=valid)
  if forced is None:
    return
  if config.k is None:
    _own_tokens(forced, context.group_size or T, T)
    return
  if forced.ndim == 3:
    within("context.layer", context.layer, forced.shape[0])
  within("forced", forced, config.num_experts, least=-1, valid=valid)


def within(
  name: str, ids: Any, size: int | None, *, least: int = 0, valid: Any = None
) -> None:
  """Raises if an id that can be read is not in `[least, size)`.

  Args:
    name: of the argument.
    ids: integers `[T]`, `[T,K]`, `[L,T,K]`, in one or more leading dimensions; None or
      traced ones are not read.
    size: of what the ids count through; None: not known.
    least: the lowest id allowed.
    valid: of the tokens, positive if they are no padding; that may hold anything.
  """
  ids = _read(ids)
  if ids is None or size is None or ids.size == 0:
    return
  if least <= ids.min() and ids.max() < size:
    return
  bad = (ids < least) | (ids >= size)
  if valid is not None:
    valid = _read(valid)
    if valid is None:
      return
    if ids.size != valid.size:  # [T,K] or [L,T,K]
      valid = np.repeat(valid.reshape(-1), ids.shape[-1])
      valid = np.tile(valid, ids.size // valid.size)
    bad &= valid.reshape(bad.shape) > 0
  if bad.any():
    raise ValueError(
      f"{name} holds {ids[bad].flat[0]}, outside {least}..{size - 1}; pass ids in that "
      f"range{', -1 for an unused choice' if least < 0 else ''}."
    )


def _own_tokens(forced: Any, S: int, T: int) -> None:
  """The same for tokens that experts of each group chose."""
  tokens_GEC = _read(forced)
  if tokens_GEC is None:
    return
  start_G11 = np.arange(num_groups(T, S))[:, None, None] * S
  own = (tokens_GEC >= start_G11) & (tokens_GEC < np.minimum(start_G11 + S, T))
  bad = ~own & (tokens_GEC != -1)
  if bad.any():
    g = int(np.argwhere(bad)[0][0])
    raise ValueError(
      f"forced holds token {tokens_GEC[bad][0]} in group {g}, which has tokens "
      f"{g * S}..{min(g * S + S, T) - 1}; pass tokens of the group, or -1 for none."
    )


def _read(array: Any) -> np.ndarray | None:
  """The values of an array that is neither traced nor spread over other hosts."""
  if isinstance(array, int | np.ndarray):
    return np.asarray(array)
  if not isinstance(array, Array) or isinstance(array, Tracer):
    return None
  return np.asarray(jax.device_get(array)) if array.is_fully_addressable else None
