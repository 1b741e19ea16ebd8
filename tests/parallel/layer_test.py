"""Over a mesh: copies of experts, soft routing, stacks, both shells, recorded choices.

Each compared with the same layer on one device; the matrix is in `contract_test`.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe import (
  Context,
  MoEConfig,
  aggregate,
  combine,
  dispatch,
  experts,
  gates,
  keeping,
  use,
)
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.experts import layout
from jmoe.layer import apply, init_state, moe_init
from jmoe.parallel import (
  EXPERT_FSDP,
  EXPERT_TENSOR,
  FSDP,
  Rules,
  mesh,
  param_specs,
  shard_params,
)
from tests._cases import quickly
from tests.parallel.cases import MATMUL, RULES
from tests.tolerance import assert_close

B, S, D, F, E = 8, 4, 8, 4, 8
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, S, D))
EXPERTS = use(experts.glu, d_ff=F, bias=True, **MATMUL)
BASE = MoEConfig(D, E, experts=EXPERTS, sharding=EXPERT_TENSOR)
SLOTS = use(jmoe.capacity.by_factor, factor=1.5, multiple_of=2)


def compare(config, sizes, *, x=X, alone=None, explicit=False, **given):
  """Output, gradients and reports over a mesh, or sizes of one, and on one device."""
  params = moe_init(KEY, config)
  params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)
    ).reshape(p.shape), params)  # fmt: skip
  state = init_state(config, params)

  def run(config):
    def total(params, x):
      y, info = apply(params, x, config, state=state, train=True, key=KEY, **given)
      return jnp.sum(jnp.sin(y)) + sum(info.losses.values()), (y, info)

    with quickly():
      return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)

  alone = dataclasses.replace(config, sharding=None) if alone is None else alone
  expected = run(dataclasses.replace(alone, sharding=None))
  if isinstance(sizes, str):
    sizes = mesh.make(sizes, axes=(*mesh.AXES, "node"), explicit=explicit)
  with jax.set_mesh(sizes):
    found = run(config)
  jax.tree.map(assert_close, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
  "used, slots",
  [
    (use(dispatch.all_to_all), SLOTS),
    (use(dispatch.ragged_all_to_all), None),
    (use(dispatch.deduplicated), None),
    (use(dispatch.all_gather), None),
  ],
  ids=lambda value: getattr(value, "name", ""),
)
def test_copies_of_experts_change_nothing(used, slots):
  busy = layout.replicate([9, 1, 1, 1, 1, 5], num_devices=4, slots_per_device=2)
  assert sorted(busy) == [0, 0, 1, 2, 3, 4, 5, 5]
  rules = dataclasses.replace(EXPERT_TENSOR, placement=busy)
  config = dataclasses.replace(
    BASE, num_experts=6, dispatch=used, capacity=slots, group_size=8, sharding=rules
  )
  local = use(dispatch.buckets if slots else dispatch.sort)
  compare(
    config, "expert=4,tensor=2", alone=dataclasses.replace(config, dispatch=local)
  )


def test_copies_are_left_out_where_one_device_has_all_experts():
  rules = dataclasses.replace(EXPERT_TENSOR, placement=(5, 0, 1, 2, 3, 4, 5, 0))
  used = use(dispatch.ragged_all_to_all)
  config = dataclasses.replace(BASE, num_experts=6, dispatch=used, sharding=rules)
  sort = dataclasses.replace(config, dispatch=use(dispatch.sort))
  two = mesh.make("fsdp=2,expert=1", devices=jax.devices()[:2])
  compare(config, two, alone=sort)


@pytest.mark.parametrize("table", [FSDP, EXPERT_TENSOR], ids=["fsdp", "expert_tensor"])
def test_masked_experts_are_those_of_one_device(table):
  """Their matrices come to the tokens; hidden units may stay split."""
  plain = use(experts.glu, d_ff=F, bias=True)
  config = dataclasses.replace(
    BASE, experts=plain, dispatch=use(dispatch.mask), sharding=table
  )
  compare(config, "data=2,fsdp=2,tensor=2" if table is FSDP else "expert=4,tensor=2")


def test_placements_hold_every_expert_and_fill_every_device():
  assert layout.place(6, 4) == (0, 1, 2, 3, 4, 5, 0, 1)
  params = moe_init(KEY, BASE)["experts"]
  twice = layout.take_slots(params, (0, 1, 0))
  np.testing.assert_array_equal(twice["up_EDF"][2], params["up_EDF"][0])
  for load in ([1.0, float("nan")], [1.0, float("inf")], [1.0, -1.0], []):
    with pytest.raises(ValueError, match="must hold numbers from 0 up"):
      layout.replicate(load, num_devices=4, slots_per_device=1)
  with pytest.raises(ValueError, match="slots_per_device=2 or more"):
    layout.replicate([1.0] * 8, num_devices=4, slots_per_device=1)


@pytest.mark.parametrize("explicit", [False, True])
def test_soft_routing(explicit):
  config = dataclasses.replace(
    BASE,
    gate=use(gates.slots, slots_per_expert=2),
    router=use(jmoe.routers.soft),
    dispatch=use(dispatch.mix),
    losses=(),
  )
  compare(config, "data=2,expert=2,tensor=2", explicit=explicit)


@pytest.mark.parametrize(
  "used", [dispatch.deduplicated, dispatch.ragged_all_to_all, dispatch.all_gather]
)
def test_stacks_come_home_vector_by_vector(used):
  config = dataclasses.replace(
    BASE,
    combine=use(combine.stack),
    aggregate=use(aggregate.per_task, num_tasks=3),
    router=use(jmoe.routers.every_expert),
    dispatch=use(used),
  )
  if used is not dispatch.all_gather:
    given = dict(residual=jnp.cos(X))
    config = dataclasses.replace(
      config,
      aggregate=use(aggregate.dag, d_message=3),
      router=use(jmoe.routers.top_k, k=3),
    )
  else:
    given = {}
  ids = jnp.zeros((B, S), jnp.int32)
  sort = dataclasses.replace(config, dispatch=use(dispatch.sort))
  context = Context(task_id=ids)
  compare(config, "data=2,expert=4", alone=sort, context=context, **given)


@pytest.mark.parametrize("explicit", [False, True])
def test_masks_split_by_xla(explicit):
  config = dataclasses.replace(BASE, dispatch=use(dispatch.einsum), capacity=SLOTS)
  compare(config, "data=2,expert=4", explicit=explicit)


@pytest.mark.contract
@pytest.mark.parametrize("used", [dispatch.all_gather, dispatch.einsum])
def test_a_mesh_may_have_axes_of_both_types(used):
  slots = SLOTS if used is dispatch.einsum else None
  config = dataclasses.replace(BASE, dispatch=use(used), capacity=slots)
  auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
  names, kinds = ("data", "expert", "tensor"), (explicit, auto, auto)
  compare(config, jax.make_mesh((2, 2, 2), names, axis_types=kinds))


def test_recorded_choices_and_rows_of_any_length():
  forced = jax.random.randint(KEY, (B * S, 2), -1, E, jnp.int32)
  row = jnp.asarray(np.sort(np.arange(B * S) * 7 % 5), jnp.int32)
  losses = (use(jmoe.losses.load_balance, over="sequence"),)
  config = dataclasses.replace(
    BASE, losses=losses, dispatch=use(dispatch.ragged_all_to_all)
  )
  sort = dataclasses.replace(config, dispatch=use(dispatch.sort))
  context = Context(row=row, num_rows=5)
  compare(config, "context=2,expert=4", alone=sort, x=X, forced=forced, context=context)
  flat = X.reshape(-1, D)  # as many rows as no shard has whole
  short = Context(num_rows=2)
  compare(config, "data=2,expert=4", alone=sort, x=flat, context=short)


def test_a_bounded_buffer_counts_what_it_drops():
  config = dataclasses.replace(
    BASE, dispatch=use(dispatch.ragged_all_to_all), max_rows=0.3, losses=()
  )
  params = moe_init(KEY, config)
  params["gate"] = {"kernel_DE": jnp.eye(D, E) * jnp.where(jnp.arange(E) < 2, 9.0, 0.1)}
  with jax.set_mesh(mesh.make("data=2,expert=4")):
    y, info = apply(params, X, config, with_plan=True)
  kept = np.asarray(info.plan.kept)
  share = float(info.dropped["buffer"])
  assert 0.1 < share < 0.9
  assert_close(np.float32(share), np.float32(1 - kept.mean()))
  # Each device's rows: of its two experts, from the tokens of its four devices.
  device = np.asarray(info.plan.routing.expert)[kept] // 2
  source = np.repeat(np.arange(8), B * S * 2 // 8)[kept]
  for data in (0, 1):
    mine = device[source // 4 == data]
    assert np.bincount(mine, minlength=4).max() <= int(0.3 * 4 * 8)
  assert np.isfinite(np.asarray(y)).all()


@pytest.mark.contract
def test_both_shells_and_no_mesh():
  config = dataclasses.replace(
    BASE, dispatch=use(dispatch.all_gather), balance=use(jmoe.balance.update)
  )
  module = jmoe.nnx.MoE(config, rngs=nnx.Rngs(0))
  plain, _ = module(X, train=True)
  params = module.params()
  linen = jmoe.linen.MoE(config)
  state = module.get_state()
  variables = {"params": params, "moe_state": {"state": state}}
  with jax.set_mesh(mesh.make("fsdp=2,expert=2,tensor=2")):
    y, info = module(X, train=True)
    module.update(info)
    (again, _), new = linen.apply(variables, X, train=True, mutable=["moe_state"])
  assert_close(jax.device_get(y), jax.device_get(plain))
  assert_close(jax.device_get(again), jax.device_get(plain))
  bias = jax.device_get(new["moe_state"]["state"].bias)
  assert_close(jax.device_get(module.get_state().bias), bias)
  assert np.abs(bias).max() > 0


def test_parameters_that_axes_do_not_divide_are_named_before_any_is_moved():
  config = jmoe.simple(16, 32, num_experts=6, k=2)
  with pytest.raises(
    ValueError, match=r"\['down_EFD'\].* 6 is .* expert=4; use 4 or 8"
  ):
    shard_params(moe_init(KEY, config), EXPERT_TENSOR, mesh.make("data=2,expert=4"))
  assert jmoe.experts.layout.place(6, 4) == (0, 1, 2, 3, 4, 5, 0, 1)  # what helps


def test_parameters_may_rest_where_the_table_says():
  config = dataclasses.replace(BASE, dispatch=use(dispatch.all_gather))
  params = moe_init(KEY, config)
  made = jax.make_mesh(
    (2, 2, 2), ("fsdp", "expert", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )  # fmt: skip
  spread = shard_params(params, EXPERT_TENSOR, made)
  shard = spread["experts"]["up_EDF"].addressable_shards[0].data
  assert shard.shape == (E // 4, D, F // 2)  # whole experts, as far as they divide
  assert spread["gate"]["kernel_DE"].is_fully_replicated
  with jax.set_mesh(made):
    y, _ = apply(spread, X, config)
  alone, _ = apply(params, X, dataclasses.replace(config, sharding=None))
  assert_close(jax.device_get(y), jax.device_get(alone))


@pytest.mark.parametrize(
  "num_experts, at", [(E, ("fsdp", None, None)), (E - 2, (None, "fsdp", None))]
)
def test_experts_rest_whole_where_they_divide(num_experts, at):
  config = dataclasses.replace(BASE, num_experts=num_experts, sharding=FSDP)
  params = moe_init(KEY, config)
  specs = param_specs(params, FSDP, {"fsdp": 4})
  assert tuple(specs["experts"]["up_EDF"]) == at
  with jax.set_mesh(mesh.make({"fsdp": 4}, devices=jax.devices()[:4])):
    y, _ = apply(params, X, config)
  alone, _ = apply(params, X, dataclasses.replace(config, sharding=None))
  assert_close(jax.device_get(y), jax.device_get(alone))


def test_a_kept_routing_is_not_gathered_again():
  config = dataclasses.replace(BASE, dispatch=use(dispatch.all_gather))
  params = moe_init(KEY, config)

  @functools.partial(jax.checkpoint, policy=keeping.policy(("routing",)))
  def total(params, x):
    return jnp.sum(apply(params, x, config)[0])

  with jax.set_mesh(mesh.make({"expert": 2}, devices=jax.devices()[:2])):
    step = str(jax.make_jaxpr(jax.grad(total))(params, X))
  # Tokens, choices and weights; backward tokens again, and the gradient of sums.
  assert step.count("= all_gather[") == 3 + 2


def test_axes_can_be_renamed():
  rules = Rules(tokens=("a", "b"), expert=("b",), d_model=("a",))
  config = dataclasses.replace(BASE, dispatch=use(dispatch.all_gather), sharding=rules)
  params = moe_init(KEY, config)
  with jax.set_mesh(mesh.make("a=2,b=2", axes=("a", "b"), devices=jax.devices()[:4])):
    y, _ = apply(params, X, config)
  alone, _ = apply(params, X, dataclasses.replace(config, sharding=None))
  assert_close(jax.device_get(y), jax.device_get(alone))
  assert RULES.axes("expert", {"expert": 1}) == ()


def test_a_whole_model_has_specs_by_the_same_table():
  block = BlockConfig(Attention(num_heads=2), jmoe.simple(8, 4, num_experts=4))
  dense = BlockConfig(Attention(num_heads=2), Dense(8))
  config = ModelConfig(16, 8, segments=(((block, dense), 2),), tied=False)
  model = nnx.eval_shape(lambda: jmoe.models.Decoder(config, rngs=nnx.Rngs(0)))
  sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
  specs = param_specs(nnx.state(model, nnx.Param), EXPERT_TENSOR, sizes)
  found = {
    jax.tree_util.keystr(path): tuple(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )
  }

  def of(*names):
    (one,) = {v for k, v in found.items() if all(f"[{n!r}]" in k for n in names)}
    return one

  assert of("experts", "down_EFD") == (None, ("expert", "fsdp"), "tensor", None)
  assert of("moe", "kernel_DE") == (None, None, None)
  assert of("query", "kernel") == (None, "fsdp", "tensor")
  assert of("out", "kernel") == (None, "tensor", "fsdp")
  assert of("ff", "down", "kernel") == (None, "tensor", "fsdp")
  assert of("embed", "embedding") == ("tensor", "fsdp")
  assert of("unembed", "kernel") == ("fsdp", "tensor")


@pytest.mark.parametrize("rules, sizes", [
  (EXPERT_TENSOR, "data=2,expert=2,tensor=2"),
  (EXPERT_TENSOR, "data=4,expert=1,tensor=2"),
  (EXPERT_FSDP, "data=2,expert=2,fsdp=2"),
  (EXPERT_FSDP, "expert=1,fsdp=8"),
  (EXPERT_FSDP, "expert=8"),
])  # fmt: skip
@pytest.mark.parametrize("explicit", [False, True])
def test_a_step_of_ones_own_is_compiled_once(rules, sizes, explicit):
  """Parameters lie as the step gives them back, also those that are whole."""
  made = mesh.make(sizes, explicit=explicit)
  config = dataclasses.replace(BASE, sharding=rules)
  params = shard_params(moe_init(KEY, config), rules, made)

  def once(params, x):
    def loss(params):
      return jnp.sum(apply(params, x, config)[0] ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

  own = jax.tree.map(lambda p: p.sharding, params)
  with jax.set_mesh(made), quickly():
    for step in (jax.jit(once), jax.jit(once, out_shardings=own)):
      given = params
      for _ in range(3):
        given = step(given, X)
      assert step._cache_size() == 1
