"""A device's own rows and those of the others: where each goes, and the way back."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe import MoEConfig, capacity, dispatch, experts, moe, routers, use
from jmoe.dispatch import all_gather, apart
from jmoe.layer import param_shapes
from jmoe.parallel import mesh as meshes
from tests.parallel import cases
from tests.tolerance import assert_close

AXES = [(("expert",), {"expert": 2}), (("expert",), {"expert": 3}),
        (("node", "expert"), {"node": 2, "expert": 2})]  # fmt: skip


def over(function, axes, sizes, *arrays):
  """Results of a function on each of n devices: arrays [n, ...] in and out."""
  n, spec = int(np.prod(list(sizes.values()))), PartitionSpec(axes)
  mesh = meshes.make(sizes, axes=axes, devices=jax.devices()[:n])

  def local(*parts):
    found = function(*(part[0] for part in parts), axes)
    return jax.tree.map(lambda x: x[None], found)

  call = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
  return jax.tree.map(np.asarray, jax.jit(call)(*arrays))


def drawn(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axes, sizes", AXES)
@pytest.mark.parametrize("tail", [(), (5,), (2, 5)])
def test_rows_of_the_others_come_in_a_circle_and_sums_go_back(axes, sizes, tail):
  n, T = int(np.prod(list(sizes.values()))), 7
  x, y = drawn(n, T, *tail), drawn(n, (n - 1) * T, *tail, seed=1)
  come = over(apart.others, axes, sizes, x)
  home = over(apart.from_others, axes, sizes, y)
  for me in range(n):
    circle = [(me + step) % n for step in range(1, n)]
    np.testing.assert_array_equal(come[me], np.concatenate([x[d] for d in circle]))
    # What d has for me stands where I am in d's circle.
    places = [(d, (me - d - 1) % n) for d in circle]
    total = sum(y[d, p * T : (p + 1) * T].astype(np.float64) for d, p in places)
    np.testing.assert_allclose(home[me], total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes, sizes", AXES)
def test_slots_part_by_their_experts_device_and_join_again(axes, sizes):
  n, local, S, D = int(np.prod(list(sizes.values()))), 2, 3, 4
  x = drawn(n, n * local, S, D)
  own, late = over(apart.slots_apart, axes, sizes, x)
  for me in range(n):
    mine = slice(me * local, (me + 1) * local)
    np.testing.assert_array_equal(own[me], x[me, mine])
    circle = [x[(me + step) % n, mine] for step in range(1, n)]
    np.testing.assert_array_equal(late[me], np.concatenate(circle, axis=1))
  again = over(apart.slots_joined, axes, sizes, own, late)
  np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("axes, sizes", AXES)
def test_each_way_is_the_gradient_of_the_other(axes, sizes):
  """`<A x, y> = <x, A^T y>` over all devices, of both pairs."""
  n = int(np.prod(list(sizes.values())))

  def tokens(x, y, axis):
    _, pull = jax.vjp(functools.partial(apart.others, axis=axis), x)
    _, back = jax.vjp(functools.partial(apart.from_others, axis=axis), y)
    return pull(y)[0], back(x)[0]

  x, y = drawn(n, 4, 3), drawn(n, (n - 1) * 4, 3, seed=1)
  dx, dy = over(tokens, axes, sizes, x, y)
  np.testing.assert_allclose(dx, over(apart.from_others, axes, sizes, y), rtol=1e-6)
  np.testing.assert_array_equal(dy, over(apart.others, axes, sizes, x))

  def slots(x, own, late, axis):
    _, pull = jax.vjp(lambda x: apart.slots_apart(x, axis), x)
    _, back = jax.vjp(lambda *both: apart.slots_joined(*both, axis), own, late)
    return pull((own, late))[0], back(x)

  x = drawn(n, n * 2, 3, 4)
  own, late = drawn(n, 2, 3, 4, seed=1), drawn(n, 2, (n - 1) * 3, 4, seed=2)
  dx, both = over(slots, axes, sizes, x, own, late)
  joined = over(apart.slots_joined, axes, sizes, own, late)
  np.testing.assert_array_equal(dx, joined)
  parted = over(apart.slots_apart, axes, sizes, x)
  jax.tree.map(np.testing.assert_array_equal, both, parted)


@pytest.mark.parametrize("strategy", ["all_gather, slots", "all_to_all"])
@pytest.mark.parametrize("mesh", ["expert=1,data=8", "expert=2,data=4"])
def test_slots_and_a_mesh_whose_experts_are_all_here(strategy, mesh):
  """With capacity, and where there are no others."""
  row = dict(router="top_k 2, bias, scale", strategy=strategy, extra="plain")
  config = cases.config_of(row)
  used = use(config.dispatch.function, own_first=True)
  config = dataclasses.replace(config, dispatch=used)
  found = cases.results(config, "plain", mesh=meshes.make(mesh, axes=cases.AXES))
  expected = cases.one_device(row)
  jax.tree.map(assert_close, *({**x, "kept": 0} for x in (found, expected)))


def test_sums_from_several_devices_are_formed_in_float32():
  """Forward, and where they are gradients of rows that went to all others."""
  n = 8
  y = jnp.ones((n, n - 1, 1), jnp.bfloat16).at[0].set(256.0)
  x = jnp.zeros((n, 1, 1), jnp.bfloat16)

  def pulled(y, x, axis):
    _, pull = jax.vjp(functools.partial(apart.others, axis=axis), x)
    return pull(y)[0]

  # 256 and six times 1: in bfloat16 each 1 by itself would be lost.
  expected = [7.0] + [262.0] * (n - 1)
  for found in (
    over(apart.from_others, ("expert",), {"expert": n}, y),
    over(pulled, ("expert",), {"expert": n}, y, x),
  ):
    np.testing.assert_array_equal(found[:, 0, 0].astype(np.float32), expected)


def test_whole_numbers_and_rows_go_together():
  """As routing does; a gradient is of what has one."""
  n, axes = 4, ("expert",)
  x, index = drawn(n, 5), np.arange(n * 5, dtype=np.int32).reshape(n, 5)

  def pulled(x, index, axis):
    (rows, at), pull = jax.vjp(lambda x: apart.others((x, index), axis), x)
    zeros = np.zeros(at.shape, jax.dtypes.float0)
    return at, pull((jnp.ones_like(rows), zeros))[0]

  at, dx = over(pulled, axes, {"expert": n}, x, index)
  np.testing.assert_array_equal(at, over(apart.others, axes, {"expert": n}, index))
  np.testing.assert_array_equal(dx, np.full((n, 5), n - 1.0))


@pytest.mark.parametrize("fields, each", [
  (dict(capacity=use(capacity.by_factor, factor=1.0), group_size=32), [4, 28]),
  (dict(max_rows=0.5), [32, 128]), (dict(), [32, 224]),
])  # fmt: skip
def test_buffers_have_room_for_what_can_come_to_each(fields, each, monkeypatch):
  """Of slots as much in all as in one buffer; a bound holds for each by itself.

  Eight devices with 32 tokens each, an expert on each, one choice.
  """
  seen = []
  module = sys.modules[all_gather.__module__]
  real = module.requeue
  monkeypatch.setattr(module, "requeue", lambda *a: seen.append(a[-1]) or real(*a))
  config = MoEConfig(
    8, 8, experts=use(experts.mlp, d_ff=4), router=use(routers.top_k, k=1),
    dispatch=use(dispatch.all_gather, own_first=True), losses=(),
    sharding=cases.RULES, **fields,
  )  # fmt: skip
  shapes = param_shapes(config), jax.ShapeDtypeStruct((8 * 32, 8), jnp.float32)
  with jax.set_mesh(meshes.make("expert=8", axes=cases.AXES)):
    jax.eval_shape(lambda params, x: moe(params, x, config)[0], *shapes)
  assert seen == each


@pytest.mark.parametrize("strategy, by", [
  ("all_gather", "ragged"), ("all_gather", "all_to_all"), ("all_to_all", "ragged"),
])  # fmt: skip
def test_another_way_of_exchange_is_refused(strategy, by):
  used = use(getattr(dispatch, strategy), own_first=True, by=by)
  with pytest.raises(ValueError, match=f"by='{by}' with own_first=True"):
    MoEConfig(4, 4, dispatch=used, **cases.LIMITED)


def test_chunks_beside_it_and_what_is_no_truth_value_are_refused():
  used = use(dispatch.all_to_all, own_first=True, overlap=2)
  with pytest.raises(ValueError, match="overlap=2 with own_first=True; use overlap=1"):
    MoEConfig(4, 4, dispatch=used, **cases.LIMITED)
  with pytest.raises(ValueError, match="own_first=1 must be True or False"):
    MoEConfig(4, 4, dispatch=use(dispatch.all_gather, own_first=1))
