"""Rows to the devices of their experts, as many as there are, and home again."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch import carry
from jmoe.dispatch.exchange import exchange
from jmoe.dispatch.layout import ragged, slots
from jmoe.dispatch.replicas import physical
from jmoe.dispatch.requeue import requeue
from jmoe.kernels.devices import row_alignment
from jmoe.kernels.varying import search
from jmoe.types import Home, Plan, Rows
from jmoe.use import marked


@marked(dropless=None, exchanges=True)
def ragged_all_to_all(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  block: int | None = None,
) -> Array:
  """Every kept assignment travels once each way; no slot travels empty.

  MegaBlocks (arXiv 2211.15841) over devices.  A device's buffer has room for all rows
  of all devices, or for as many as `MoEConfig(max_rows=)` says: a share of these.  Then
  the longest queues are cut before anything is sent, and `Info.dropped["buffer"]` says
  how much.  Takes plans with a capacity too.

  Args:
    x_TD: this device's tokens.
    plan: of these.
    experts: this device's, rows -> [R,D].
    home: how outputs come home.
    axis: mesh axes over which the experts are; none: all are here.
    placement: the expert of each slot of these axes, if some are there twice.
    block: rows an expert's group is aligned to; None chooses.

  Returns:
    `[T,D]` or `[T,K,D]`.
  """
  routing, T = plan.routing, x_TD.shape[0]
  expert_N, E = physical(plan, placement)
  sent = requeue(jnp.where(plan.kept, expert_N, -1), routing.token, E, T, routing.k)
  layout = ragged(sent, 1)  # no padding travels
  scale = None
  if home.input_scale is not None:
    scale = carry.spread(home.input_scale, layout)
  x_ND = Rows(x_TD, layout.groups, layout, scale).gathered()
  n = lax.psum(1, axis) if axis else 1
  count_nnE = _gathered(sent.load[0], axis).reshape(n, n, E // n)
  count_nn = jnp.sum(count_nnE, axis=2, dtype=jnp.int32)
  room = buffer_rows(plan, n, E // n)
  mine_nE = count_nnE[:, lax.axis_index(axis) if axis else 0]
  got_RD = x_ND[:room]
  if axis:  # nobody reads what nobody sent
    got_RD = exchange(x_ND, count_nn, room, axis, zero=False)

  # From every device its rows by expert; the experts want all of one together.
  end = jnp.cumsum(mine_nE.reshape(-1), dtype=jnp.int32)
  row_R = jnp.arange(room, dtype=jnp.int32)
  of_R = search(end, row_R, "right").astype(jnp.int32)
  expert_R = jnp.where(row_R < end[-1], of_R % (E // n), -1)
  mine = requeue(expert_R, row_R, E // n, room, 1, room)
  mean = x_ND.shape[0] * n / E
  served = ragged(mine, block, alignment=row_alignment(x_TD.dtype, mean))
  rows = Rows(got_RD, served.groups, served, travels=bool(axis))
  y_RD = carry.summed_home(experts(rows), served)

  back_ND = y_RD
  if axis:
    back_ND = exchange(y_RD, count_nn.T, x_ND.shape[0], axis, zero=False)
  return carry.home(back_ND, Home(home.weight, sums=home.sums), layout)


def buffer_rows(plan: Plan, num_devices: int, num_local: int) -> int:
  """Rows that a device of several may be sent, at most.

  Args:
    plan: of one of them; `max_rows` is a bound for all of their rows.
    num_devices: that send.
    num_local: experts of the receiver.
  """
  most = plan.order.shape[0] * num_devices
  if plan.max_rows is not None:
    most = min(most, plan.max_rows)
  if plan.capacity is not None:
    most = min(most, num_devices * num_local * plan.load.shape[0] * slots(plan))
  return most


def _gathered(load_E: Array, axis: tuple[str, ...]) -> Array:
  """i32[n,E] of all devices."""
  return lax.all_gather(load_E, axis) if axis else load_E[None]
