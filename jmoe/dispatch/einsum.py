"""One-hot matmuls (GShard): the reference, and what XLA shards by itself."""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jmoe.kernels.mask_product import mask_product
from jmoe.types import Groups, Home, Plan, Rows, group_of, wide
from jmoe.use import marked


@marked(dropless=False, gspmd=True)
def einsum(
  x_TD: Array,
  plan: Plan,
  experts: Callable[[Rows], Array],
  home: Home,
  *,
  axis: tuple[str, ...] = (),
) -> Array:
  """Dispatch and combine as products with dense masks `[G,S,E,C]`.

  GShard (arXiv 2006.16468), algorithm 2.  Memory grows with T*E*C: for small shapes,
  for meshes without `shard_map`, and to compare the others with.  Rows in bfloat16 are
  moved by bfloat16 products on TPUs and newer GPUs, which `jax.jvp` does not pass.

  Args:
    x_TD: activations.
    plan: with a capacity.
    experts: rows -> [R,D].
    home: how outputs come home.
    axis: mesh axes over which XLA is to split the experts, whole arrays being here.

  Returns:
    `[T,D]` or `[T,K,D]`; dropped assignments give zero.
  """
  routing = plan.routing
  T, E, D = routing.num_tokens, routing.num_experts, x_TD.shape[1]
  G, S = plan.load.shape[0], routing.group_size or routing.num_tokens
  assert plan.capacity is not None
  C = plan.capacity if isinstance(plan.capacity, int) else max(plan.capacity)
  dtype = wide(x_TD)
  exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

  expert_NE = jax.nn.one_hot(routing.expert, E, dtype=dtype)
  slot_NC = jax.nn.one_hot(plan.slot, C, dtype=dtype)
  slot_NC = jnp.where(plan.kept[:, None], slot_NC, 0)
  tokens = jnp.arange(T, dtype=jnp.int32) if routing.k is None else None
  x_GSD = jnp.pad(x_TD, ((0, G * S - T), (0, 0))).reshape(G, S, D)

  def per_token(weight_N: Array) -> Array:
    """f32[G,S,E,C]: the weight of every kept assignment at its place."""
    weighed_NE = expert_NE * weight_N.astype(dtype)[:, None]
    if tokens is None:
      mask = exactly(
        "TKE,TKC->TEC",
        weighed_NE.reshape(T, routing.k, E),
        slot_NC.reshape(T, routing.k, C),
      )
    else:
      own_TN = (routing.token[None, :] == tokens[:, None]).astype(dtype)
      mask = exactly("TN,NEC->TEC", own_TN, weighed_NE[:, :, None] * slot_NC[:, None])
    return jnp.pad(mask, ((0, G * S - T), (0, 0), (0, 0))).reshape(G, S, E, C)

  if home.input_scale is None:  # ones, which any dtype holds
    sent = per_token(jnp.ones(routing.weight.shape, dtype)).astype(x_TD.dtype)
  else:
    sent = per_token(home.input_scale)
  x_EGCD = mask_product("GSEC,GSD->EGCD", sent, x_GSD, x_TD.dtype)
  x_EGCD = _split(x_EGCD, axis)
  groups = Groups(
    start=jnp.arange(E, dtype=jnp.int32) * (G * C),
    rows=jnp.full(E, G * C, jnp.int32),
    capacity=G * C,
  )
  y_RD = experts(Rows(x_EGCD.reshape(E * G * C, D), groups))
  y_EGCD = _split(y_RD.reshape(E, G, C, y_RD.shape[1]), axis)
  if home.sums:
    weight = per_token(home.weight)
    y_GSD = mask_product("GSEC,EGCD->GSD", weight, y_EGCD, x_TD.dtype)
    return y_GSD.reshape(G * S, -1)[:T]
  group_NG = jax.nn.one_hot(group_of(routing.token, routing.group_size), G, dtype=dtype)
  at_NEGC = jnp.einsum("NE,NG,NC->NEGC", expert_NE, group_NG, slot_NC)
  y_ND = exactly("NEGC,EGCD->ND", at_NEGC, y_EGCD.astype(dtype))
  y_ND = y_ND * home.weight[:, None]
  return y_ND.reshape(T, routing.k or 1, -1).astype(x_TD.dtype)


def _split(x_EGCD: Array, axis: tuple[str, ...]) -> Array:
  """The same, experts apart on these axes; XLA sees to the other dimensions."""
  if not axis:
    return x_EGCD
  free = PartitionSpec.UNCONSTRAINED
  return jax.lax.with_sharding_constraint(
    x_EGCD, PartitionSpec(axis, *[free] * (x_EGCD.ndim - 1))
  )
