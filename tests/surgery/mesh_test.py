"""Operations on models over eight devices: equal numbers, laid out as they were."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jmoe import renormalise, surgery
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.parallel import mesh as meshes
from jmoe.surgery import cluster, flex, grow, merge, upcycle
from jmoe.use import use
from tests.surgery import cases
from tests.tolerance import assert_close

SAMPLE = cases.sample()
SPARSE = cases.model(cases.config(cases.layer(
  renormalise=use(renormalise.over_chosen))))  # fmt: skip
_DENSE = BlockConfig(Attention(num_heads=2), Dense(12))
DENSE = cases.model(ModelConfig(cases.V, cases.D, (((_DENSE,), 2),), remat=False))
SPLIT = {
  "_EDF": (None, "expert", "fsdp", None),
  "_EFD": (None, "expert", None, "fsdp"),
  "query.kernel": (None, "fsdp", None),
  "embedding": (None, "fsdp"),
}


@functools.cache
def mesh():
  return meshes.make("expert=2,fsdp=4", devices=jax.devices()[:8])


def spread(model):
  def put(name, x):
    spec = next((s for end, s in SPLIT.items() if name.endswith(end)), ())
    shared = ".shared." in name  # [repeat,1,D,F]
    spec = tuple(None if a == "expert" and shared else a for a in spec)
    return jax.device_put(x, NamedSharding(mesh(), PartitionSpec(*spec)))

  return model._replace(params={n: put(n, x) for n, x in model.params.items()})


@pytest.mark.parametrize(
  "parent, change",
  [
    (SPARSE, lambda m: surgery.cut_model(m, [[0, 1, 3, 5], [1, 2]])),
    (SPARSE, lambda m: surgery.layerwise(m, [SAMPLE], keep=2).model),
    (SPARSE, lambda m: surgery.cut_model(m, [[0, 1, 3]] * 2)),
    (SPARSE, lambda m: grow.grow(m, 2, bias=-1.0)),
    (SPARSE, lambda m: grow.silent(m, 2)),
    (SPARSE, lambda m: merge.concatenate([m, m])),
    (SPARSE, lambda m: merge.average([m, m])),
    (SPARSE, lambda m: upcycle.expand(m, times=2)),
    (SPARSE, surgery.to_dense),
    (DENSE, lambda m: upcycle.upcycle(m, num_experts=4)),
    (DENSE, lambda m: merge.mix([m, m])),
    (DENSE, lambda m: flex.begin(m, [SAMPLE], [SAMPLE])),
    (
      DENSE,
      lambda m: cluster.cluster(m, num_experts=4, k=2, blocks_changed=[0, 1]).model,
    ),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_models_over_a_mesh_give_what_those_on_the_host_give(parent, change):
  here, there = change(parent), change(spread(parent))
  assert here.config == there.config
  assert set(here.params) == set(there.params)
  for name, x in there.params.items():
    assert_close(np.asarray(x), np.asarray(here.params[name]), name)
    at = x.sharding
    assert isinstance(at, NamedSharding) and at.mesh.size == 8, name
    for end, spec in SPLIT.items():
      if name.endswith(end) and ".shared." not in name and name in parent.params:
        whole = x.shape[1] % 2 and spec[1] == "expert"
        expected = tuple(None if a == "expert" and whole else a for a in spec)
        assert at.is_equivalent_to(
          NamedSharding(mesh(), PartitionSpec(*expected)), x.ndim
        ), name


def test_a_receipt_of_models_over_a_mesh_is_that_of_the_host():
  name = "embed.embedding"
  louder = SPARSE._replace(params={**SPARSE.params, name: 1.5 * SPARSE.params[name]})
  made = surgery.moved(spread(SPARSE), spread(louder), SAMPLE)
  for name, value in surgery.moved(SPARSE, louder, SAMPLE).items():
    np.testing.assert_allclose(made[name], value, rtol=1e-4)
