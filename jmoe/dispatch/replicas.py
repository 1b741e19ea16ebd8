"""Which copy of an expert serves a token, where some experts are on several devices."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.assign import assign
from jmoe.dispatch.layout import slots
from jmoe.types import Context, Plan


def physical(plan: Plan, placement: tuple[int, ...] | None) -> tuple[Array, int]:
  """(i32[N] the slot of each entry, the number of slots) of the expert axis.

  Copies take turns by token index, so a load is split evenly whoever chose the expert.

  Args:
    plan: of experts.
    placement: the expert that each slot holds; None: slot e holds expert e.
  """
  routing = plan.routing
  if placement is None:
    return routing.expert, routing.num_experts
  copies_EC, count_E = _copies(placement, routing.num_experts)
  turn_N = routing.token % jnp.asarray(count_E)[routing.expert]
  return jnp.asarray(copies_EC)[routing.expert, turn_N], len(placement)


def _copies(placement: tuple[int, ...], num_experts: int):
  """Slots of each expert, and how many there are."""
  slots = [[s for s, e in enumerate(placement) if e == x] for x in range(num_experts)]
  most = max(map(len, slots))
  copies = [[own[i % len(own)] for i in range(most)] for own in slots]
  return np.array(copies, np.int32), np.array([len(own) for own in slots], np.int32)


def spread_plan(plan: Plan, placement: tuple[int, ...] | None) -> Plan:
  """The plan over slots of the expert axis instead of experts, with its capacity.

  Who is kept was decided; each copy has as many slots as its expert.
  """
  if placement is None:
    return plan
  routing = plan.routing
  slot_N, num_slots = physical(plan, placement)
  nothing = jnp.zeros((routing.num_tokens, num_slots), jnp.float32)
  copies = dataclasses.replace(
    routing, expert=slot_N, queues=plan.kept, live=plan.kept, probs=nothing
  )
  copies = dataclasses.replace(copies, logits=nothing, capacity=slots(plan))
  return assign(copies, Context())
