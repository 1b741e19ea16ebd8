"""What a context must be; from fields shaped like activations to one per token."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.types import Context
from jmoe.use import shown

PER_TOKEN = (
  "valid", "row", "segment", "position", "token_id", "domain_id", "task_id", "modality"
)  # fmt: skip


def flatten(context: Context | None, lead: tuple[int, ...]) -> Context:
  """The context of `prod(lead)` tokens, from fields shaped `lead` or `[T]`.

  Segments shaped `[..., S]` are made unique over the batch: a packer numbers the
  documents of every row from one.

  Args:
    context: fields shaped like the activations without their last dimension.
    lead: the activations' leading dimensions; the last one is the sequence.

  Raises:
    TypeError: no context, or a field that is not an array.
    ValueError: a field of another shape or dtype.
  """
  context = with_rows(context, lead)
  check(context, lead)
  return tokens(context, lead)


def with_rows(context: Context | None, lead: tuple[int, ...]) -> Context:
  """The context with as many rows as the leading dimensions hold, unless it says."""
  context = Context() if context is None else context
  if isinstance(context, Context) and context.num_rows is context.row is None:
    return dataclasses.replace(context, num_rows=math.prod(lead[:-1]))
  return context


def check(context: Context, lead: tuple[int, ...]) -> None:
  """Raises unless every field is an array as long as the tokens; computes nothing."""
  if not isinstance(context, Context):
    raise TypeError(
      f"context={shown(context)} is no jmoe.Context; write Context(valid=...)."
    )
  shapes = dict.fromkeys((lead, (math.prod(lead),)))
  for name in (*PER_TOKEN, "layer", "table"):
    array = getattr(context, name)
    if array is None or name == "layer" and isinstance(array, int):
      continue
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
      raise TypeError(f"context.{name}={shown(array)} is not an array; pass one.")
    expected = shapes if name in PER_TOKEN else ((),) if name == "layer" else None
    if expected is not None and array.shape not in expected:
      raise ValueError(
        f"context.{name} has shape {array.shape}; expected "
        f"{' or '.join(map(str, expected))}."
      )
    kind = jnp.bool_ if name == "valid" else jnp.integer
    if not jnp.issubdtype(array.dtype, kind):
      wanted = "bool" if name == "valid" else "integers"
      raise ValueError(
        f"context.{name} has dtype {array.dtype}; expected {wanted}, so cast it."
      )
  for name in ("num_rows", "num_segments"):
    number = getattr(context, name)
    whole = isinstance(number, int) and not isinstance(number, bool)
    if number is not None and not (whole and number >= 1):
      raise ValueError(
        f"context.{name}={shown(number)} must be a whole number of at least 1."
      )


def tokens(context: Context, lead: tuple[int, ...]) -> Context:
  """The fields of a checked context as one entry per token, segments made unique."""
  T = math.prod(lead)
  changed: dict[str, Any] = {}
  for name in PER_TOKEN:
    array = getattr(context, name)
    if array is None:
      continue
    if name == "segment" and len(lead) > 1 and array.shape == lead:
      array = unique_segments(array.reshape(-1, lead[-1]))
      changed["row_segments"] = lead[-1]
      if context.num_segments is None:
        changed["num_segments"] = T
    changed[name] = array.reshape(T)
  return dataclasses.replace(context, **changed)


def unique_segments(segment_BS: Array) -> Array:
  """i32[B,S] document numbers unique over the batch, from ids unique within a row.

  A document is a run of equal ids; run j of row b gets `b*S + j`.

  >>> print(unique_segments(jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])))
  [[0 0 1 2]
   [4 5 5 5]]
  """
  B, S = segment_BS.shape
  new_BS = (segment_BS[:, 1:] != segment_BS[:, :-1]).astype(jnp.int32)
  run_BS = jnp.pad(jnp.cumsum(new_BS, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
  return run_BS + (jnp.arange(B, dtype=jnp.int32) * S)[:, None]


def choose_layer(forced: Array, context: Context) -> Array:
  """The recorded choices of this layer from those of all, i32[L,T,K] -> i32[T,K]."""
  assert context.layer is not None
  return jax.lax.dynamic_index_in_dim(forced, context.layer, keepdims=False)
