"""What cannot be split says so before anything is compiled: argument, value, remedy."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe import MoEConfig, capacity, dispatch, experts, gates, routers, use
from jmoe.layer import apply, moe_init
from jmoe.parallel import EXPERT, EXPERT_TENSOR, Rules, mesh

pytestmark = pytest.mark.contract
D, F, E = 8, 4, 8
BASE = MoEConfig(
  D,
  E,
  experts=use(experts.glu, d_ff=F),
  dispatch=use(dispatch.all_gather),
  sharding=EXPERT_TENSOR,
)
SLOTS = dict(
  dispatch=use(dispatch.all_to_all), capacity=use(capacity.by_factor, factor=2.0)
)
SOFT: dict[str, Any] = dict(
  gate=use(gates.slots, slots_per_expert=1),
  router=use(routers.soft),
  dispatch=use(dispatch.mix),
  losses=(),
)
FREE = use(experts.with_free, base=use(experts.glu, d_ff=F), copy=2)


@pytest.mark.parametrize(
  "sizes, said",
  [
    ("data=2,expert=2", "is 4 devices, but there are 8; data=4 or expert=4 would do"),
    ("data=3,expert=3", "is 9 devices, but there are 8; give sizes of 8"),
    ("data=2,expret=4", "unknown axis 'expret'; did you mean 'expert'?"),
    ("data=2,data=4", "axis 'data' is listed twice; give each axis once"),
    ("data=0", "data=0 must be a whole number of at least 1"),
    ("data=two", "data='two' must be a whole number of at least 1"),
    ("data", "'data' has no size; write 'data=2'"),
    ("", "'' names no axis; write 'data=8'"),
    ({"data": 8.0}, "data=8.0 must be a whole number of at least 1"),
  ],
)
def test_meshes(sizes, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    mesh.make(sizes)


def test_a_mesh_has_devices():
  with pytest.raises(ValueError, match="^mesh: devices=\\[\\] holds none; give some"):
    mesh.make("data=1", devices=[])


def test_tables():
  with pytest.raises(TypeError, match="tokens=3 must be a tuple of names"):
    Rules(tokens=3)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match="unknown keyword 'token'; did you mean 'tokens'"):
    Rules(token=("data",))  # type: ignore[call-arg]
  with pytest.raises(ValueError, match="lists an axis twice; give each axis once"):
    Rules(expert=("a", "a"))
  with pytest.raises(ValueError, match="'a' splits tokens and sequence"):
    Rules(tokens=("a",), sequence=("a",))
  with pytest.raises(ValueError, match="'a' splits d_model and d_ff, which are dim"):
    Rules(d_model=("a",), d_ff=("b", "a"))
  with pytest.raises(TypeError, match="placement=.0, 1.5. must be a tuple of numbers"):
    Rules(placement=(0, 1.5))  # type: ignore[arg-type]
  assert hash(Rules(placement=[0, 1])) == hash(Rules(placement=(0, 1)))  # type: ignore
  with pytest.raises(TypeError, match="mesh: 8 is no text and no mapping; write"):
    mesh.make(8)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match="is no table; use jmoe.parallel.Rules"):
    dataclasses.replace(BASE, sharding="expert")
  with pytest.raises(ValueError, match="overlap=0 must be a whole number"):
    dataclasses.replace(
      BASE, **{**SLOTS, "dispatch": use(dispatch.all_to_all, overlap=0)}
    )
  with pytest.raises(ValueError, match="no fixed number of choices"):
    dataclasses.replace(
      BASE, router=use(routers.expert_choice), dispatch=use(dispatch.deduplicated),
      losses=(),
    )  # fmt: skip


CASES = [
  (dict(num_experts=6), "expert=4,data=2", "num_experts=6 is not divisible by the "
   "expert axes (expert=4); use 4 or 8 experts, axes of 2 or 3 or 6"),
  (dict(experts=use(experts.glu, d_ff=6)), "tensor=4,data=2",
   "is split by tensor=4 over 6; use 4 or 8, or other axes"),
  (dict(d_model=6, num_experts=6), "fsdp=4,data=2",
   "is split by fsdp=4 over 6; use 4 or 8"),
  (dict(), "data=8", "4 is not divisible by data=8; use 8, or other axes"),
  (dict(), "data=2,context=4", "6 is not divisible by context=4; use 4 or 8"),
  (SLOTS, "data=4,tensor=2", "group_size=None: groups of 24 tokens straddle shards of "
   "6 tokens in a row; use group_size=6 or 3 or 2 or 1"),
  (dict(SLOTS, group_size="row"), "data=4,context=2", "group_size='row': groups of 6 "
   "tokens straddle shards of 3 tokens in a row; use group_size=3 or 1"),
  (dict(SLOTS, group_size=3, dispatch=use(dispatch.all_to_all, overlap=4)),
   "data=4,tensor=2", "overlap=4 does not divide the capacity of 2 slots; use "
   "overlap=1 or 2"),
  (dict(experts=FREE), "expert=4,data=2", "experts=with_free cannot be split"),
  (dict(experts=FREE), "tensor=4,data=2", "experts=with_free cannot be split"),
  (dict(sharding=Rules(tokens=("x",))), "data=4,tensor=2", "names no axis of the mesh"),
  (dict(sharding=Rules(tokens=("data",), expert=("tensor",))), "data=4,tensor=2",
   "expert axis 'tensor' does not split the tokens"),
  (dict(sharding=Rules(tokens=("data",), expert=("tensor",)),
        dispatch=use(dispatch.sort)), "data=4,tensor=2",
   "'tensor' does not split the tokens, so there is nothing"),
  (dict(sharding=Rules(tokens=("data",), d_model=("tensor",))), "data=4,tensor=2",
   "d_model axis 'tensor' does not split the tokens"),
  (dict(sharding=dataclasses.replace(EXPERT, placement=(0, 1, 2, 3))),
   "data=2,expert=4", "must hold every expert of 8 and be a multiple of the 4 devices"),
  (dict(sharding=dataclasses.replace(EXPERT, placement=tuple(range(8))),
        dispatch=use(dispatch.sort)), "data=2,expert=4", "which exchanges no rows"),
  (dict(SOFT, sharding=dataclasses.replace(EXPERT, placement=tuple(range(8)))),
   "data=2,expert=4", "which knows no copies; use placement=None"),
  (SOFT, "data=2,context=2,tensor=2", "mixes whole rows: those of 6 tokens straddle "
   "shards of 3 tokens in a row; split tokens by rows"),
  (dict(sharding=dataclasses.replace(EXPERT, placement=tuple(range(8))), max_rows=0.5,
        dispatch=use(dispatch.ragged_all_to_all)), "data=2,expert=4",
   "not of their copies; use max_rows=None"),
]  # fmt: skip


@pytest.mark.parametrize("fields, sizes, said", CASES, ids=[c[2][:30] for c in CASES])
def test_layers(fields, sizes, said):
  config = dataclasses.replace(BASE, **fields)
  params = moe_init(jax.random.key(0), config)
  x = jnp.ones((4, 6, config.d_model))
  with jax.set_mesh(mesh.make(sizes)):
    with jax.log_compiles(False), pytest.raises(ValueError, match=re.escape(said)):
      apply(params, x, config)


def test_types_that_split_tokens_need_a_table():
  config = dataclasses.replace(BASE, sharding=None, dispatch=use(dispatch.sort))
  params = moe_init(jax.random.key(0), config)
  made = mesh.make("data=8", explicit=True)
  at = jax.sharding.NamedSharding(made, jax.sharding.PartitionSpec("data"))
  with jax.set_mesh(made):
    x = jax.device_put(jnp.ones((8, 2, D)), at)
    with pytest.raises(ValueError, match="by its type, .*sharding=None does not say"):
      apply(params, x, config)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mesh_that_a_layer_would_not_see():
  params, x = moe_init(jax.random.key(0), BASE), jnp.ones((8, 2, D))
  made = mesh.make("data=8")
  with made:
    with pytest.raises(
      ValueError, match=r"'data',\).*write `with jax.set_mesh\(mesh\)"
    ):
      apply(params, x, BASE)
    free = dataclasses.replace(BASE, sharding=None, dispatch=use(dispatch.sort))
    apply(params, x, free)  # of one device, and nothing else was asked for
    with jax.set_mesh(made):
      apply(params, x, BASE)


def test_a_layer_makes_its_own_shard_map():
  params = moe_init(jax.random.key(0), BASE)
  spec = jax.sharding.PartitionSpec

  def inside(params, x):
    return jmoe.moe(params, x, BASE)[0]

  with jax.set_mesh(mesh.make("data=8")):
    with pytest.raises(ValueError, match="inside shard_map over 'data'"):
      jax.shard_map(inside, in_specs=(spec(), spec("data")), out_specs=spec("data"))(
        params, jnp.ones((16, D))
      )
