"""Recorded choices of expert choice, where a mesh splits rows, sequences, or both."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import MoEConfig, dispatch, experts, routers, use
from jmoe.layer import apply, moe_init
from jmoe.parallel import EXPERT_TENSOR, mesh
from tests._cases import quickly
from tests.parallel.cases import MATMUL
from tests.tolerance import assert_close

B, S, D, E, GROUP = 4, 8, 8, 4, 2


@pytest.mark.parametrize("sizes", ["data=2,expert=2", "context=2,expert=2"])
def test_tokens_of_the_call_are_found_on_their_shard(sizes):
  config = MoEConfig(
    D,
    E,
    experts=use(experts.glu, d_ff=4, **MATMUL),
    router=use(routers.expert_choice, capacity_factor=2.0),
    group_size=GROUP,
    losses=(),
    dispatch=use(dispatch.all_to_all),
    sharding=EXPERT_TENSOR,
  )
  # Of each group's tokens one for each expert; experts 1 of some groups have none.
  r = np.random.default_rng(0)
  first_G11 = np.arange(0, B * S, GROUP)[:, None, None]
  forced = first_G11 + r.integers(0, GROUP, (B * S // GROUP, E, 1))
  forced[::3, 1] = -1
  forced = jnp.asarray(forced, jnp.int32)
  params = moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (B, S, D))
  alone = dataclasses.replace(config, dispatch=use(dispatch.buckets), sharding=None)
  with quickly():
    expected, _ = apply(params, x, alone, forced=forced)
    with jax.set_mesh(mesh.make(sizes, devices=jax.devices()[:4])):
      found, _ = apply(params, x, config, forced=forced)
  assert np.abs(expected).max() > 0.01
  assert_close(jax.device_get(found), jax.device_get(expected))
