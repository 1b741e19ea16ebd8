"""What travels: the collectives of the compiled layer, counted, forward and backward.

A rule that is lost (an axis that no longer splits a matrix, a sum that moved) changes a
number here.  Bytes are those of a device's results.
"""
# SPDX-License-Identifier: Apache-2.0

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jmoe import MoEConfig, capacity, dispatch, experts, use
from jmoe.layer import moe, moe_init, param_shapes
from jmoe.parallel import mesh, shard_params
from tests._cases import quickly
from tests.parallel.cases import AXES, RULES

T, D, F, E = 128, 16, 8, 8
SLOTS = use(capacity.by_factor, factor=1.0, multiple_of=2)
STRATEGIES = {
  "all_to_all": (use(dispatch.all_to_all), SLOTS),
  "all_to_all, overlap": (use(dispatch.all_to_all, overlap=2), SLOTS),
  "hierarchical": (use(dispatch.hierarchical), SLOTS),
  "all_gather": (use(dispatch.all_gather), None),
  "ragged_all_to_all": (use(dispatch.ragged_all_to_all), None),
  "deduplicated": (use(dispatch.deduplicated), None),
  "sort": (use(dispatch.sort), None),
}
BY_EXCHANGE, EINSUM = "all_gather by all_to_all", "einsum"
GATHER_OWN_FIRST, SLOTS_OWN_FIRST = "all_gather, own first", "all_to_all, own first"
MESHES = ("data=2,expert=4", "fsdp=2,expert=2,tensor=2")
NODES = "node=2,expert=4"
# (strategy, mesh, pass) -> collective -> (how many, bytes)
# That of ragged and deduplicated exchanges on CPUs is their stand-in's, for the worst
# case.
GOLDEN = {
  ("all_to_all", "data=2,expert=4", "forward"): {"all-to-all": (2, 4096)},
  ("all_to_all", "data=2,expert=4", "backward"): {
    "all-reduce": (2, 3584),
    "all-to-all": (4, 8192),
  },
  ("all_to_all", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (3, 3072),
    "all-reduce": (1, 2048),
    "all-to-all": (2, 8192),
  },
  ("all_to_all", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (3, 3072),
    "all-reduce": (2, 2816),
    "all-to-all": (4, 16384),
    "reduce-scatter": (3, 1536),
  },
  ("all_to_all, overlap", "data=2,expert=4", "forward"): {"all-to-all": (4, 4096)},
  ("all_to_all, overlap", "data=2,expert=4", "backward"): {
    "all-reduce": (2, 3584),
    "all-to-all": (8, 8192),
  },
  ("all_to_all, overlap", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (3, 3072),
    "all-reduce": (1, 2048),
    "all-to-all": (4, 8192),
  },
  ("all_to_all, overlap", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (3, 3072),
    "all-reduce": (2, 2816),
    "all-to-all": (8, 16384),
    "reduce-scatter": (3, 1536),
  },
  ("hierarchical", "data=2,expert=4", "forward"): {"all-to-all": (2, 4096)},
  ("hierarchical", "data=2,expert=4", "backward"): {
    "all-reduce": (2, 3584),
    "all-to-all": (4, 8192),
  },
  ("hierarchical", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (3, 3072),
    "all-reduce": (1, 2048),
    "all-to-all": (2, 8192),
  },
  ("hierarchical", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (3, 3072),
    "all-reduce": (2, 2816),
    "all-to-all": (4, 16384),
    "reduce-scatter": (3, 1536),
  },
  ("all_gather", "data=2,expert=4", "forward"): {
    "all-gather": (3, 5120),
    "reduce-scatter": (1, 1024),
  },
  ("all_gather", "data=2,expert=4", "backward"): {
    "all-gather": (4, 9216),
    "all-reduce": (2, 3584),
    "reduce-scatter": (2, 1152),
  },
  ("all_gather", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (6, 8192),
    "all-reduce": (1, 2048),
    "reduce-scatter": (1, 2048),
  },
  ("all_gather", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (7, 12288),
    "all-reduce": (2, 2816),
    "reduce-scatter": (5, 3840),
  },
  # Three shifts of 16 tokens, their two choices and weights, and sums: 64 bytes a row.
  ("all_gather, own first", "data=2,expert=4", "forward"): {
    "collective-permute": (12, 6912)
  },
  ("all_gather, own first", "data=2,expert=4", "backward"): {
    "all-reduce": (2, 3584),
    "collective-permute": (18, 10368),
  },
  # Of 32 slots all but one's own eight.
  ("all_to_all, own first", "data=2,expert=4", "forward"): {
    "collective-permute": (6, 3072)
  },
  ("all_to_all, own first", "data=2,expert=4", "backward"): {
    "all-reduce": (2, 3584),
    "collective-permute": (12, 6144),
  },
  ("ragged_all_to_all", "data=2,expert=4", "forward"): {
    "all-gather": (1, 128),
    "all-to-all": (2, 40960),
  },
  ("ragged_all_to_all", "data=2,expert=4", "backward"): {
    "all-gather": (1, 128),
    "all-reduce": (2, 3584),
    "all-to-all": (4, 81920),
  },
  ("ragged_all_to_all", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (4, 3136),
    "all-reduce": (1, 2048),
    "all-to-all": (2, 24576),
  },
  ("ragged_all_to_all", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (4, 3136),
    "all-reduce": (2, 2816),
    "all-to-all": (4, 49152),
    "reduce-scatter": (3, 1536),
  },
  ("deduplicated", "data=2,expert=4", "forward"): {
    "all-gather": (1, 64),
    "all-to-all": (3, 26624),
  },
  ("deduplicated", "data=2,expert=4", "backward"): {
    "all-gather": (1, 64),
    "all-reduce": (2, 3584),
    "all-to-all": (5, 38912),
  },
  ("deduplicated", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (4, 3088),
    "all-reduce": (1, 2048),
    "all-to-all": (3, 18432),
  },
  ("deduplicated", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (4, 3088),
    "all-reduce": (2, 2816),
    "all-to-all": (5, 28672),
    "reduce-scatter": (3, 1536),
  },
  ("sort", "data=2,expert=4", "forward"): {"all-gather": (3, 12288)},
  ("sort", "data=2,expert=4", "backward"): {
    "all-gather": (3, 12288),
    "all-reduce": (2, 3584),
    "reduce-scatter": (3, 3072),
  },
  ("sort", "fsdp=2,expert=2,tensor=2", "forward"): {
    "all-gather": (3, 6144),
    "all-reduce": (1, 2048),
  },
  ("sort", "fsdp=2,expert=2,tensor=2", "backward"): {
    "all-gather": (3, 6144),
    "all-reduce": (2, 2816),
    "reduce-scatter": (3, 1536),
  },
  (BY_EXCHANGE, "data=2,expert=4", "forward"): {
    "all-gather": (2, 1024),
    "all-to-all": (2, 8192),
  },
  (BY_EXCHANGE, "data=2,expert=4", "backward"): {
    "all-gather": (2, 1024),
    "all-reduce": (2, 3584),
    "all-to-all": (3, 12288),
    "reduce-scatter": (1, 128),
  },
  (EINSUM, "data=2,expert=4", "forward"): {
    "all-gather": (10, 26624),
    "all-reduce": (1, 4096),
  },
  (EINSUM, "data=2,expert=4", "backward"): {
    "all-gather": (14, 43008),
    "all-reduce": (3, 7168),
  },
  ("all_to_all", "node=2,expert=4", "forward"): {"all-to-all": (2, 4096)},
  ("all_to_all", "node=2,expert=4", "backward"): {
    "all-reduce": (1, 512),
    "all-to-all": (4, 8192),
  },
  ("hierarchical", "node=2,expert=4", "forward"): {"all-to-all": (4, 8192)},
  ("hierarchical", "node=2,expert=4", "backward"): {
    "all-reduce": (1, 512),
    "all-to-all": (8, 16384),
  },
}
_SIZE = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
_OPERATION = re.compile(
  r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  r"|ragged-all-to-all)(?:-start)?\("
)


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Collective -> (how many, bytes of their results) in compiled text."""
  found = collections.defaultdict(lambda: [0, 0])
  for shapes, name in _OPERATION.findall(text):
    found[name][0] += 1
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
      found[name][1] += _SIZE[kind] * math.prod(map(int, filter(None, dims.split(","))))
  return {name: tuple(pair) for name, pair in sorted(found.items())}


def compiled(strategy: str, sizes: str, backward: bool) -> dict[str, tuple[int, int]]:
  used, slots = STRATEGIES[strategy]
  config = MoEConfig(
    D, E, experts=use(experts.glu, d_ff=F), dispatch=used, capacity=slots,
    group_size=16, losses=(), sharding=RULES,
  )  # fmt: skip

  def y(params, x):
    return moe(params, x, config)[0]

  def pulled(params, x, dy):
    return jax.vjp(y, params, x)[1](dy)

  x = jax.ShapeDtypeStruct((T, D), jnp.float32)
  given = (param_shapes(config), x, x)
  with jax.set_mesh(mesh.make(sizes, axes=AXES)), quickly():
    call = jax.jit(pulled).lower(*given) if backward else jax.jit(y).lower(*given[:2])
    return collectives(call.compile().as_text())


CELLS = [*itertools.product(STRATEGIES, MESHES)]
CELLS += [(strategy, NODES) for strategy in ("all_to_all", "hierarchical")]
CELLS += [(BY_EXCHANGE, MESHES[0]), (EINSUM, MESHES[0])]
CELLS += [(GATHER_OWN_FIRST, MESHES[0]), (SLOTS_OWN_FIRST, MESHES[0])]
STRATEGIES[BY_EXCHANGE] = (use(dispatch.all_gather, by="all_to_all"), None)
STRATEGIES[GATHER_OWN_FIRST] = (use(dispatch.all_gather, own_first=True), None)
STRATEGIES[SLOTS_OWN_FIRST] = (use(dispatch.all_to_all, own_first=True), SLOTS)
STRATEGIES[EINSUM] = (use(dispatch.einsum), SLOTS)  # what XLA decides (GSPMD)


@pytest.mark.parametrize("strategy, sizes", CELLS)
def test_collectives_are_those_written_down(strategy, sizes):
  for way in ("forward", "backward"):
    found = compiled(strategy, sizes, way == "backward")
    assert found == GOLDEN[strategy, sizes, way], way


def test_a_step_is_compiled_once_and_stays_on_the_devices():
  config = MoEConfig(
    D, E, experts=use(experts.glu, d_ff=F), dispatch=use(dispatch.ragged_all_to_all),
    sharding=RULES,
  )  # fmt: skip
  traced = []

  @jax.jit
  def step(params, x):
    traced.append(1)

    def loss(params):
      y, info = moe(params, x, config)
      return jnp.mean(jnp.square(y)) + sum(info.losses.values())

    grads = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  now = mesh.make("fsdp=2,expert=2,tensor=2")
  with jax.set_mesh(now), quickly():
    params = shard_params(moe_init(jax.random.key(0), config), RULES, now)
    whole = jax.sharding.NamedSharding(now, jax.sharding.PartitionSpec())
    x = jax.device_put(jax.random.normal(jax.random.key(1), (T, D)), whole)
    first = params = step(params, x)
    with jax.transfer_guard("disallow"):
      for _ in range(2):
        params = step(params, x)
    assert len(traced) <= 2  # given and returned parameters may be laid out differently
    shard = first["experts"]["up_EDF"].addressable_shards[0].data
    assert shard.shape == (E // 4, D, F // 2)
