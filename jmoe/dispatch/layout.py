"""The row layout that every grouped matmul reads, as one value.

Each expert's rows start at a multiple of a block.  Ragged groups (dropless) and equal
ones (capacity buckets) are the same value with other numbers.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.kernels.counting import places, running
from jmoe.kernels.devices import spare_blocks
from jmoe.types import Groups, Layout, Plan, group_of


def block_size(rows_per_expert: float, most: int = 64) -> int:
  """A power of two from 8 to `most`, near the mean rows of an expert."""
  block = 8
  while block < most and block < rows_per_expert:
    block *= 2
  return block


def slots(plan: Plan) -> int:
  """Slots of an expert in a group, of a plan with a capacity."""
  capacity = plan.capacity
  assert capacity is not None
  return capacity if isinstance(capacity, int) else max(capacity)


@jax.named_scope("layout")
def ragged(plan: Plan, block: int | None = None, *, alignment: int = 1) -> Layout:
  """Rows packed by expert, each expert's from a multiple of `block` on.

  Args:
    plan: of one group, dropless.
    block: rows; None chooses by the mean rows of an expert.
    alignment: what `block` is at least, if it is not given.

  Returns:
    Layout of a static number of rows: `N + (block-1) * min(E, N)` rounded down to
    blocks, or as `plan.max_rows` bounds it; large ones on TPUs some blocks more.
  """
  E, N = plan.load.shape[1], plan.order.shape[0]
  bound = N if plan.max_rows is None else min(N, plan.max_rows)
  block = max(block_size(bound / E), alignment) if block is None else block
  blocks = (bound + (block - 1) * min(E, bound)) // block
  R = (blocks + spare_blocks(blocks)) * block
  rows_E = plan.rows[0]
  # row -> expert: by block, since every row of a block has the same expert; and counted
  # in blocks as `kernels.row_blocks` does, so that XLA does it once
  count_E = -(-rows_E // block)
  end_E = running(count_E)
  start_E = (end_E - count_E) * block
  index_B = jnp.arange(R // block, dtype=jnp.int32)
  expert_B = jnp.minimum(places(end_E, index_B, side="right"), E - 1)
  place_BR = (index_B * block - start_E[expert_B])[:, None] + jnp.arange(
    block, dtype=jnp.int32
  )
  taken_BR = place_BR < rows_E[expert_B][:, None]
  at_BR = plan.first[0][expert_B][:, None] + place_BR
  row_N = start_E[plan.routing.expert] + plan.slot
  groups = Groups(start_E, rows_E, block)
  return _layout(plan, at_BR.reshape(-1), taken_BR.reshape(-1), row_N, groups)


@jax.named_scope("layout")
def equal(plan: Plan, block: int | None = None, *, alignment: int = 1) -> Layout:
  """Capacity buckets: `[E, G, C]` rows, an expert's padded to a block.

  Args:
    plan: with a capacity.
    block: rows; None chooses by the rows of an expert.
    alignment: rows that a chosen block has at least.

  Returns:
    Layout of `E * ceil(G*C / block) * block` rows.
  """
  G, E = plan.load.shape
  C = slots(plan)
  block = max(block_size(G * C), alignment) if block is None else block
  stride = max(block, -(-G * C // block) * block)
  place = jnp.arange(stride, dtype=jnp.int32)
  g, c = jnp.minimum(place // max(C, 1), G - 1), place % max(C, 1)
  at = plan.first.T[:, g] + c  # [E, stride]
  taken = (place < G * C) & (c < plan.rows.T[:, g])
  start_E = jnp.arange(E, dtype=jnp.int32) * stride
  group_N = group_of(plan.routing.token, plan.routing.group_size)
  row_N = start_E[plan.routing.expert] + group_N * C + plan.slot
  # Up to the last slot taken; with several groups there are empty ones before it.
  last_GE = plan.rows + jnp.arange(G, dtype=jnp.int32)[:, None] * C
  rows_E = jnp.max(jnp.where(plan.rows > 0, last_GE, 0), axis=0)
  groups = Groups(start_E, rows_E, block, capacity=stride)
  return _layout(plan, at.reshape(-1), taken.reshape(-1), row_N, groups)


def _layout(
  plan: Plan, at_R: Array, taken_R: Array, row_N: Array, groups: Groups
) -> Layout:
  N, T = plan.order.shape[0], plan.routing.num_tokens
  R = at_R.shape[0]
  if N == 0 or R == 0:
    empty = jnp.zeros(R, jnp.int32)
    row_N = jnp.full(N, R, jnp.int32)
    return Layout(empty + T, empty + N, row_N, groups, T, plan.routing.k)
  entry_R = plan.order[jnp.minimum(at_R, N - 1)]
  # A choice that was skipped but holds its slot leaves a hole.
  taken_R = taken_R & plan.kept[entry_R]
  return Layout(
    token=jnp.where(taken_R, plan.routing.token[entry_R], T),
    entry=jnp.where(taken_R, entry_R, N),
    row=jnp.where(plan.kept, row_N, R),
    groups=groups,
    num_tokens=T,
    k=plan.routing.k,
  )
