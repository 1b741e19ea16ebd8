"""Each token once to each device that has experts for it; one vector comes back."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe.dispatch import carry
from jmoe.dispatch.exchange import exchange
from jmoe.dispatch.layout import ragged
from jmoe.dispatch.ragged_all_to_all import buffer_rows
from jmoe.dispatch.replicas import physical
from jmoe.dispatch.requeue import requeue
from jmoe.kernels.devices import row_alignment
from jmoe.types import Home, Layout, Plan, Rows
from jmoe.use import marked


def _check(config: Any, **_: Any) -> None:
  if config.k is None:
    raise ValueError(
      f"dispatch=deduplicated with router={config.router.name}: tokens have no fixed "
      "number of choices to send along; use dispatch.all_to_all or all_gather."
    )


@marked(dropless=None, exchanges=True, check=_check)
def deduplicated(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
  placement: tuple[int, ...] | None = None,
  block: int | None = None,
) -> Array:
  """A token's k rows for one device travel as one, and come back as their sum.

  DeepSeek-V3 (arXiv 2412.19437), section 3.2.1, sends so to nodes.  Routing in two
  levels: tokens choose devices, and what a device received chooses among its experts.
  Only `combine=stack`, which sums nothing, brings k vectors back.  Takes plans with a
  capacity and without.

  Args:
    x_TD: this device's tokens.
    plan: of these, with k choices a token.
    experts: this device's, rows -> [R,D].
    home: how outputs come home.
    axis: mesh axes over which the experts are; none: all are here.
    placement: the expert of each slot of these axes, if some are there twice.
    block: rows an expert's group is aligned to; None chooses.

  Returns:
    `[T,D]` or `[T,K,D]`.
  """
  routing, T = plan.routing, x_TD.shape[0]
  K = routing.k
  assert K is not None
  expert_N, E = physical(plan, placement)
  n = lax.psum(1, axis) if axis else 1
  local = E // n
  expert_TK = jnp.where(plan.kept, expert_N, -1).reshape(T, K)

  # Level one: devices.
  device_n = jnp.arange(n, dtype=jnp.int32)
  to_Tn = jnp.any(expert_TK[:, :, None] // local == device_n, axis=1)
  token_M = jnp.repeat(jnp.arange(T, dtype=jnp.int32), n)
  to_M = jnp.where(to_Tn, device_n, -1).reshape(-1)
  sent = requeue(to_M, token_M, n, T, n, T * min(n, K))
  layout = ragged(sent, 1)
  x_MD, choices = carry.out(x_TD, layout), _choices(home, expert_TK, layout, local, n)
  load_n = sent.load[0]
  count_nn = lax.all_gather(load_n, axis) if axis else load_n[None]
  if axis:
    choices = exchange(choices, count_nn, n * T, axis)
    got_RD = exchange(x_MD, count_nn, n * T, axis, zero=False)
  else:
    got_RD = x_MD

  # Level two: the experts here.  Rows that nobody sent have no choice, and no reader.
  R = got_RD.shape[0]
  ids_RK = lax.stop_gradient(choices)[:, :K]
  factors = [choices[:, i : i + K] for i in range(K, choices.shape[1], K)]
  expert_R = ids_RK.astype(jnp.int32).reshape(-1) - 1
  token_R = jnp.repeat(jnp.arange(R, dtype=jnp.int32), K)
  mine = requeue(expert_R, token_R, local, R, K, buffer_rows(plan, n, local))
  mean = T * n * K / E
  served = ragged(mine, block, alignment=row_alignment(x_TD.dtype, mean))
  way = Home(
    factors[0].reshape(-1),
    input_scale=factors[1].reshape(-1) if len(factors) > 1 else None,
    sums=home.sums,
  )
  y_RD = carry.through(got_RD, served, experts, way, travels=bool(axis))
  back_MD = y_RD = y_RD.reshape(R, -1)
  if axis:
    back_MD = exchange(y_RD, count_nn.T, x_MD.shape[0], axis, zero=False)
  y_TD = carry.summed_home(back_MD, layout)
  return y_TD if home.sums else y_TD.reshape(T, K, -1)


def _choices(
  home: Home, expert_TK: Array, layout: Layout, num_local: int, num_devices: int
) -> Array:
  """f[M,2K or 3K] for each row sent: its receiver's experts, from 1; its weights.

  One array, for one exchange.  A choice of another device is 0, as is an empty row.
  """
  T, K = expert_TK.shape
  factors = [a for a in (home.weight, home.input_scale) if a is not None]
  made_MK = [carry.out(a.reshape(T, K), layout) for a in factors]
  device_M = layout.entry % num_devices
  ids_MK = expert_TK[jnp.minimum(layout.token, T - 1)] - device_M[:, None] * num_local
  ours_MK = (ids_MK >= 0) & (ids_MK < num_local) & (layout.token < T)[:, None]
  ids_MK = jnp.where(ours_MK, ids_MK + 1, 0).astype(made_MK[0].dtype)
  return jnp.concatenate([ids_MK, *made_MK], axis=1)
