"""How many slots an expert has in a routing group: the rules, by name.

A rule is `(tokens, num_experts, k, factor) -> slots`, on Python numbers or NumPy arrays
of token counts.  The published ones disagree on whether k is inside, on rounding and on
a minimum; each decides which tokens drop.  For T=1000, E=7, k=2, factor 1.25:

  ceil (ours) 358   mesh 178   lingvo 180     flaxformer 179   vmoe 360
  deepspeed 358     tutel 356  megablocks 357 megatron 358     fairseq 286
"""
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.kernels.varying import search
from jmoe.use import Use, marked

Count = Any  # int or integer np.ndarray
_MOST = 2**31 - 1  # slots that a rule gives at most: more than a group has tokens


def _up(slots: Count, multiple: int) -> Count:
  return -(-slots // multiple) * multiple


def _int(slots: Any) -> Count:
  # Bounded as a float: a cast of a larger one gives any integer.
  return np.minimum(slots, _MOST).astype(np.int64)


def ceil(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """`ceil(k * T * factor / E)`: jmoe's own rule, of the factor's decimals.

  1.1 is a little more than 11/10 as a float, and three roundings follow: less by 1e-15
  of itself, a whole number of slots is not rounded up to the next.
  """
  return _int(np.ceil(k * tokens * factor / num_experts * (1 - 1e-15)))


def mesh(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """Mesh-TensorFlow: `max(min(T, floor(T*factor/E)), 4)`, without k."""
  del k
  slots = np.floor(tokens * factor / num_experts)
  return _int(np.maximum(np.minimum(tokens, slots), 4))


@marked(multiple_of=4)
def lingvo(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """Lingvo (GShard): `floor(T*factor/E)`, 0 becomes 4, up to a multiple of 4; no k."""
  del k
  slots = np.floor(tokens * factor / num_experts)
  return _up(_int(np.where(slots == 0, 4, slots)), 4)


def flaxformer(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """Flaxformer: `round(factor*T/E)`, without k; its minimum is `minimum=4`."""
  del k
  return _int(np.round(factor * tokens / num_experts))


@marked(multiple_of=4)
def vmoe(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """V-MoE: `ceil(T*k*factor/E)`, up to a multiple of 4."""
  return _up(_int(np.ceil(tokens * k * factor / num_experts)), 4)


def deepspeed(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """DeepSpeed: `ceil(T/E * factor * k)`; its minimum is `minimum=4`."""
  return _int(np.ceil(tokens / num_experts * factor * k))


def tutel(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """Tutel: `k * floor(factor * ceil(T/E))`; alignment is `multiple_of`."""
  return _int(k * np.floor(factor * np.ceil(tokens / num_experts)))


def megablocks(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """MegaBlocks: `floor(factor*k*T/E)` with T over all devices."""
  return _int(np.floor(factor * k * tokens / num_experts))


def megatron(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """Megatron-Core: `ceil(T*k/E * factor)`; an optional minimum is `minimum`."""
  return _int(np.ceil(tokens * k / num_experts * factor))


def fairseq(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """fairseq in training: `2*ceil(T/E)`, whatever k and the factor."""
  del k, factor
  return _int(2 * np.ceil(tokens / num_experts))


def fairseq_eval(tokens: Count, num_experts: int, k: int, factor: float) -> Count:
  """fairseq outside training: `ceil(fraction*T)`, the factor being that fraction."""
  del num_experts, k
  return _int(np.ceil(factor * tokens))


RULES = (
  ceil, mesh, lingvo, flaxformer, vmoe, deepspeed, tutel, megablocks, megatron, fairseq
)  # fmt: skip


def check_factor(where: str, name: str, value: Any) -> None:
  """Raises unless a capacity factor is a positive, finite number."""
  good = isinstance(value, int | float) and not isinstance(value, bool)
  if not good or not math.isfinite(value) or value <= 0:
    raise ValueError(
      f"{where}: {name}={value!r} must be a positive number; for no limit use "
      "capacity=None (dropless)."
    )


def _check(
  config,
  *,
  factor: float,
  eval_factor: float | None = None,
  rule: Callable[..., Count] = ceil,
  eval_rule: Callable[..., Count] | None = None,
  minimum: int = 0,
  multiple_of: int = 1,
  per_expert: tuple[float, ...] | None = None,
  count: str = "valid",
) -> None:
  del rule, eval_rule
  check_factor("capacity", "factor", factor)
  if eval_factor is not None:
    check_factor("capacity", "eval_factor", eval_factor)
  if minimum < 0 or multiple_of < 1:
    raise ValueError(
      f"capacity: minimum={minimum} must be at least 0 and "
      f"multiple_of={multiple_of} at least 1."
    )
  if per_expert is not None:
    if len(per_expert) != config.num_experts:
      raise ValueError(
        f"capacity: per_expert has {len(per_expert)} entries; give one for each of "
        f"num_experts={config.num_experts}."
      )
    for value in per_expert:
      check_factor("capacity", "per_expert", value)
  if count not in ("valid", "all"):
    raise ValueError(f"capacity: count={count!r}; use 'valid' or 'all'.")


@marked(check=_check)
def by_factor(
  tokens: Count,
  num_experts: int,
  k: int,
  *,
  train: bool = False,
  factor: float,
  eval_factor: float | None = None,
  rule: Callable[..., Count] = ceil,
  eval_rule: Callable[..., Count] | None = None,
  minimum: int = 0,
  multiple_of: int = 1,
  per_expert: tuple[float, ...] | None = None,
  count: str = "valid",
) -> Count:
  """Slots per expert by a rule and a capacity factor.

  Args:
    tokens: tokens of a group.
    num_experts: E.
    k: choices per token.
    train: chooses between the two factors, and the two rules.
    factor: capacity factor; what it multiplies is the rule's affair.
    eval_factor: outside training; None: as in training.
    rule: one of this module's.
    eval_rule: outside training; None: as in training.
    minimum: slots at least.
    multiple_of: alignment, upwards.
    per_expert: a multiple of the factor for each expert (MoE++).
    count: "valid": capacity counts valid tokens only, so that padding changes nothing
      (the buffer keeps its static size); "all": padding counts, as in most codes.

  Returns:
    Integers shaped like `tokens`, with a last axis [E] if `per_expert` is given.
  """
  del count
  if not train:
    factor = factor if eval_factor is None else eval_factor
    rule = rule if eval_rule is None else eval_rule

  def slots(share: float) -> Count:
    found = rule(tokens, num_experts, k, min(factor * share, _MOST))
    return _up(np.maximum(found, min(minimum, _MOST)), multiple_of)

  if per_expert is None:
    return slots(1.0)
  return np.stack([slots(share) for share in per_expert], axis=-1)


def _check_fixed(config, *, slots: int) -> None:
  del config
  if not isinstance(slots, int) or slots < 0:
    raise ValueError(f"capacity: slots={slots!r} must be a whole number from 0 up.")


@marked(check=_check_fixed)
def fixed(
  tokens: Count, num_experts: int, k: int, *, train: bool = False, slots: int
) -> Count:
  """The same number of slots however many tokens (Hugging Face Switch: 64)."""
  del num_experts, k, train
  return np.full(np.shape(tokens), min(slots, _MOST), np.int64)


def of_group(
  capacity: Use, tokens: Count, group_size: int, num_experts: int, k: int, train: bool
) -> Count:
  """Slots per expert, but no more than the group has tokens, aligned as it asks.

  Args:
    capacity: `by_factor`, `fixed` or one like them.
    tokens: valid tokens of a group, or an array of such counts.
    group_size: how many tokens a group has, valid or not.
    num_experts, k, train: as for `by_factor`.
  """
  aligned = capacity.kwargs.get("multiple_of", 1)
  for rule in (capacity.kwargs.get("rule"), capacity.kwargs.get("eval_rule")):
    aligned = math.lcm(aligned, getattr(rule, "multiple_of", 1))
  slots = capacity(tokens, num_experts, k, train=train)
  return np.minimum(slots, _up(group_size, aligned)).astype(np.int64)


def of_valid(count_G: Array, group_size: int, rule: Callable[[Count], Count]) -> Array:
  """i32[G] or i32[G,E]: a rule applied to traced counts of valid tokens.

  The rule is run once on the host for every possible count, so that a traced count and
  a static one can never be rounded differently; of the table only the steps are kept.
  """
  slots = np.asarray(rule(np.arange(group_size + 1)))
  if slots.ndim == 2:
    return jnp.stack([_step(count_G, column) for column in slots.T], axis=-1)
  return _step(count_G, slots)


def _step(count_G: Array, slots: np.ndarray) -> Array:
  slots = np.where(np.arange(len(slots)) == 0, 0, slots)  # nothing to serve
  first = np.flatnonzero(np.diff(slots, prepend=slots[0] - 1))
  at = search(jnp.asarray(first, jnp.int32), count_G, "right") - 1
  return jnp.asarray(slots[first], jnp.int32)[at]
