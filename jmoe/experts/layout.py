"""Which device holds which expert: placements for `Rules(placement=...)`.

A placement is the expert of each slot; a device holds the next few slots.  An expert in
several slots is several copies, which take turns at its tokens.
"""
# SPDX-License-Identifier: Apache-2.0

import heapq
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmoe._value_checks import positive
from jmoe.use import shown


def place(num_experts: int, num_devices: int) -> tuple[int, ...]:
  """Every expert once, and the first ones again until all devices hold equally many.

  >>> place(6, 4)
  (0, 1, 2, 3, 4, 5, 0, 1)

  Args:
    num_experts: E.
    num_devices: along the expert axes.
  """
  positive("num_experts", num_experts)
  positive("num_devices", num_devices)
  num_slots = -(-num_experts // num_devices) * num_devices
  return tuple(slot % num_experts for slot in range(num_slots))


def replicate(
  load: Sequence[float], num_devices: int, slots_per_device: int
) -> tuple[int, ...]:
  """More copies of what is asked for more, and devices with loads alike.

  Each further slot goes to the expert with the largest load a copy; slots are then
  dealt out, the heaviest first, to the device that has least and room.  (DeepSeek-V3,
  arXiv 2412.19437, section 3.4.1, duplicates by measured load in the same spirit.)

  >>> replicate([6, 1, 1], num_devices=2, slots_per_device=2)
  (0, 1, 0, 2)

  Args:
    load: of each expert, as `Info.load`.
    num_devices: along the expert axes.
    slots_per_device: experts that a device has room for.

  Returns:
    A placement of `num_devices * slots_per_device` slots.

  Raises:
    ValueError: fewer slots than experts, or a load that is negative or not finite.
  """
  load = [float(x) for x in load]
  E, num_slots = len(load), num_devices * slots_per_device
  positive("num_devices", num_devices)
  positive("slots_per_device", slots_per_device)
  if num_slots < E:
    raise ValueError(
      f"replicate: {num_devices} devices of slots_per_device={slots_per_device} hold "
      f"fewer than {E} experts; use slots_per_device={-(-E // num_devices)} or more."
    )
  if not load or not all(0 <= x < math.inf for x in load):
    raise ValueError(f"replicate: load={shown(load)} must hold numbers from 0 up.")
  copies = [1] * E
  for _ in range(num_slots - E):
    most = max(range(E), key=lambda e: (load[e] / copies[e], -e))
    copies[most] += 1
  slots = [(load[e] / copies[e], e) for e in range(E) for _ in range(copies[e])]
  devices = [(0.0, d) for d in range(num_devices)]
  held: list[list[int]] = [[] for _ in range(num_devices)]
  for weight, e in sorted(slots, key=lambda slot: (-slot[0], slot[1])):
    total, d = heapq.heappop(devices)
    held[d].append(e)
    if len(held[d]) < slots_per_device:
      heapq.heappush(devices, (total + weight, d))
  return tuple(e for own in held for e in own)


def take_slots(params: Any, placement: Sequence[int]) -> Any:
  """Expert parameters `[E,...]` slot by slot, `[slots,...]`, copies beside each other.

  For serving, where nothing is learned: what `Rules(placement=...)` does in each call.

  Args:
    params: the part "experts" of a layer's parameters.
    placement: the expert of each slot.
  """
  index = jnp.asarray(placement, jnp.int32)
  return jax.tree.map(lambda leaf: leaf[index], params)
