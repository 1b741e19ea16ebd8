"""Queue positions by one stable sort; the kept mask; how many slots are taken.

Switch Transformer (arXiv 2101.03961), section 2.2, and GShard (arXiv 2006.16468),
algorithm 1, for any number of choices, groups, priorities and capacities.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.assign.capacity import of_group, of_valid
from jmoe.kernels.counting import places
from jmoe.kernels.devices import GPUS, current_device
from jmoe.kernels.varying import together
from jmoe.types import Context, Plan, Routing, group_of, valid_or_all
from jmoe.use import Use, fact

_MOST = 2**31 - 1  # a sort key at most


def assign(
  routing: Routing,
  context: Context,
  *,
  capacity: Use | None = None,
  priority: Use | None = None,
  train: bool = False,
  key: Array | None = None,
  max_rows: int | None = None,
  axes: tuple[str, ...] = (),
) -> Plan:
  """Queues every assignment at its expert and cuts the queue at capacity.

  Args:
    routing: N assignments.
    context: `valid` tokens are what capacity counts; `position` for random priority.
    capacity: a `capacity` function in `use`; None: dropless, or the router's own.
    priority: a `priority` function in `use`; None: entries in their order.
    train: chooses capacity factors.
    key: for random priority.
    max_rows: bound of a dropless buffer, in rows.  Every expert's queue is then cut at
      the largest common length for which all fit, so no expert starves because of its
      index.
    axes: mesh axes over which experts are, equally many on each device; then the bound
      is of each device's buffer, into which the rows of all of them go.

  Returns:
    Plan over `routing.num_groups` groups (one if dropless).
  """
  E = routing.num_experts
  limited = capacity is not None or routing.capacity is not None
  # Without a limit groups do not compete, and the order within a queue is nobody's
  # business: one group, one sort key.
  G = routing.num_groups if limited else 1
  group_N = group_of(routing.token, routing.group_size if limited else None)
  queue_N = jnp.where(routing.queues, group_N * E + routing.expert, G * E)
  priority_N = None
  if priority is not None and (limited or max_rows is not None):
    priority_N = priority(routing, context, key=key)
  levels = None if priority_N is None else _levels(priority, routing, priority_N)
  order, slot_N, bound = _queue(queue_N, G * E, priority_N, levels)
  load_GE = jnp.diff(bound).reshape(G, E)
  if routing.capacity is not None:
    static, limit_GE = routing.capacity, load_GE
  elif capacity is not None:
    static, limit_GE = _limit(routing, context, capacity, G, train)
  else:
    static, limit_GE = None, load_GE
  if max_rows is not None:
    limit_GE = jnp.minimum(limit_GE, _longest(load_GE, max_rows, axes))
  rows_GE = jnp.minimum(load_GE, limit_GE)
  rows_of_N = jnp.append(rows_GE.reshape(-1), 0)[queue_N]
  return Plan(
    routing=routing,
    order=order,
    slot=slot_N,
    kept=routing.live & (slot_N < rows_of_N),
    load=load_GE,
    rows=rows_GE,
    first=bound[:-1].reshape(G, E),
    cause="buffer" if static is None else "capacity",
    capacity=static,
    max_rows=max_rows,
  )


def _levels(priority: Any, routing: Routing, priority_N: Array) -> int | None:
  """Among how many whole numbers priorities are, if that is known."""
  # What `functools.wraps` has copied onto another function is not its own.
  if hasattr(priority.function, "__wrapped__") or priority_N.dtype != jnp.int32:
    return None
  levels = fact(priority, "levels")
  return None if levels is None else levels(routing)


def _queue(
  queue_N: Array, num_queues: int, priority_N: Array | None, levels: int | None
):
  """Entries in queue order, each one's place in its queue, and where queues begin.

  Args:
    queue_N: i32[N] from 0 to `num_queues`, which is no queue.
    num_queues: how many.
    priority_N: i32[N] or f32[N], or None.
    levels: the priorities are whole numbers from `1 - levels` to 0; None: they may not
      be.
  """
  N = queue_N.shape[0]
  index_N = jnp.arange(N, dtype=jnp.int32)
  levels = 1 if priority_N is None else levels
  highest = (num_queues + 1) * (levels or _MOST) - 1
  queues = jnp.arange(num_queues + 1, dtype=jnp.int32)
  if levels is None or highest > _MOST:
    assert priority_N is not None
    by_queue, _, order = jax.lax.sort(
      (queue_N, -priority_N, index_N), num_keys=2, is_stable=True
    )
  else:
    # One key: what XLA gives to the library's radix sort on GPUs, where two are a
    # network of its own, of thirty launches.  Half the bits are half the passes.
    key_N = queue_N if priority_N is None else queue_N * levels - priority_N
    narrow = current_device() in GPUS and highest < 1 << 16
    key_N = key_N.astype(jnp.uint16) if narrow else key_N
    by_queue, order = jax.lax.sort((key_N, index_N), num_keys=1, is_stable=True)
    by_queue, queues = by_queue.astype(jnp.int32), queues * levels
  bound = places(by_queue, queues)
  # The inverse permutation by a second sort: a scatter would be slower on accelerators.
  _, place_N = jax.lax.sort((order, index_N), num_keys=1)
  return order, place_N - bound[queue_N], bound


def _limit(
  routing: Routing, context: Context, capacity: Use, G: int, train: bool
) -> tuple[int | tuple[int, ...], Array]:
  """The static size of the buffer, and the slots i32[G,E] that may be used of it."""
  T, E, S = routing.num_tokens, routing.num_experts, routing.group_size
  S = T if S is None else S

  def slots(tokens):
    return of_group(capacity, tokens, S, E, routing.k or 1, train)

  full = np.asarray(slots(S))
  static = int(full) if full.ndim == 0 else tuple(int(c) for c in full)
  everyone = "count" in capacity.kwargs and capacity.get("count") == "all"
  if everyone or (context.valid is None and T == G * S):
    return static, jnp.broadcast_to(jnp.asarray(full, jnp.int32), (G, E))
  valid_T = valid_or_all(context, T)
  count_G = jnp.sum(
    jnp.pad(valid_T, (0, G * S - T)).reshape(G, S), axis=1, dtype=jnp.int32
  )
  limit = of_valid(count_G, S, slots)
  limit_GE = limit if limit.ndim == 2 else limit[:, None]
  return static, jnp.broadcast_to(limit_GE, (G, E))


def _longest(load_GE: Array, max_rows: int, axes: tuple[str, ...]) -> Array:
  """How long an expert's queue may be; i32[], or i32[1,E] by the expert's device."""
  if not axes:
    return _common_length(load_GE, max_rows)
  E, n = load_GE.shape[1], jax.lax.psum(1, axes)
  load_nnE = jax.lax.all_gather(load_GE[0], axes).reshape(n, n, E // n)
  of_device = functools.partial(_common_length, max_rows=max_rows)
  longest_n = jax.vmap(of_device, in_axes=1)(load_nnE)
  return jnp.repeat(longest_n, E // n)[None]


def _common_length(load_GE: Array, max_rows: int) -> Array:
  """The largest c with `sum(min(load, c)) <= max_rows`, by bisection."""
  load = load_GE.reshape(-1)

  def halve(_, bounds):
    low, high = bounds  # fits(low), and high + 1 is not known to fit
    middle = (low + high + 1) // 2
    fits = jnp.sum(jnp.minimum(load, middle)) <= max_rows
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

  bounds = together(jnp.zeros((), jnp.int32), jnp.max(load))
  return jax.lax.fori_loop(0, 32, halve, bounds)[0]
