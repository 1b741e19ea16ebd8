"""Arrays that come split by their types (AxisType.Explicit), as a table does or not."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jmoe import Context, MoEConfig, capacity, dispatch, experts, restrict, use
from jmoe.layer import apply, moe_init
from jmoe.parallel import EXPERT_TENSOR, mesh
from tests._cases import quickly
from tests.parallel.cases import MATMUL
from tests.tolerance import assert_close

D, E = 8, 8
CONFIG = MoEConfig(
  D,
  E,
  experts=use(experts.glu, d_ff=4, **MATMUL),
  restrict=(use(restrict.document_pool, least=2, most=5),),
  sharding=EXPERT_TENSOR,
)


@pytest.mark.parametrize(
  "used, slots",
  [(dispatch.all_gather, None), (dispatch.einsum, use(capacity.by_factor, factor=1.5))],
)
def test_documents_and_activations_may_be_split_by_sequence(used, slots):
  """A document lies on three devices; the output is split as the input is."""
  config = dataclasses.replace(CONFIG, dispatch=use(used), capacity=slots, group_size=2)
  local = use(dispatch.buckets if slots else dispatch.sort)
  alone = dataclasses.replace(config, dispatch=local, sharding=None)
  x = jax.random.normal(jax.random.key(1), (2, 8, D))
  segment = jnp.asarray([[0, 1, 1, 1, 1, 1, 2, 2], [4, 4, 4, 5, 5, 5, 5, 5]], jnp.int32)
  params, key = moe_init(jax.random.key(0), config), jax.random.key(2)
  given: Any = dict(train=True, key=key)
  with quickly():
    expected = apply(params, x, alone, context=Context(segment=segment), **given)
    made = mesh.make("expert=2,context=4", explicit=True)
    at = NamedSharding(made, P("expert", "context"))
    x, segment = jax.device_put((x, segment), at)
    with jax.set_mesh(made):
      found = apply(params, x, config, context=Context(segment=segment), **given)
  assert found[0].sharding.is_equivalent_to(at, 3)
  assert np.abs(found[0]).max() > 0
  jax.tree.map(assert_close, *map(jax.device_get, (found, expected)))
