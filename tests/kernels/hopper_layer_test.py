"""A sparse layer by Hopper's kernels: interpreted, lowered, and on a GPU."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.dispatch import carry
from jmoe.kernels import devices, hopper as chip
from jmoe.kernels.hopper_walk import share
from jmoe.parallel import mesh as meshes
from jmoe.use import use
from tests.kernels.hopper_cases import (
  as_hopper as as_hopper,
  error,
  hopper,
  lowers,
  on_cpu,
)


def with_free(limited: bool) -> jmoe.MoEConfig:
  base = use(jmoe.experts.glu, d_ff=128)
  return jmoe.MoEConfig(
    128,
    6,
    experts=use(jmoe.experts.with_free, base=base, constant=1, copy=1, zero=1),
    capacity=use(jmoe.capacity.by_factor, factor=1.5) if limited else None,
    dispatch=use(jmoe.dispatch.buckets if limited else jmoe.dispatch.sort),
  )


def simple(keep: str | None = None, d_ff: int = 128, **fields) -> jmoe.MoEConfig:
  """A small layer whose experts keep that much for the backward pass."""
  config = jmoe.simple(128, d_ff, num_experts=4, k=2, **fields)
  if keep is None:
    return config
  keywords = {**config.experts.kwargs, "keep": keep}
  return dataclasses.replace(config, experts=use(config.experts.function, **keywords))


LAYERS = {
  "glu": simple(),
  "glu, made anew": simple("inputs"),
  "gelu, capacity, rows kept": simple(
    "rows", activation=jax.nn.gelu, capacity_factor=1.0
  ),
  "glu with biases": simple(bias=True, d_ff=192),  # one tile and a half
  "mlp with biases, made anew": simple("inputs", gated=False, bias=True),
  "relu": simple(gated=False, activation=jax.nn.relu),
  "free experts": with_free(False),
  "free experts, capacity": with_free(True),
}


def narrow(params):
  """Experts in bfloat16."""
  experts = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params["experts"])
  return {**params, "experts": experts}


def moved(a):
  """An array and something else."""
  key = jax.random.key(a.size)
  return a + (0.1 * jax.random.normal(key, a.shape)).astype(a.dtype)


def check(config):
  """Values and all gradients; blocks that no kernel writes hold NaN here."""
  params = narrow(jmoe.moe_init(jax.random.key(0), config))
  params["experts"] = jax.tree.map(moved, params["experts"])  # biases start at zero
  x = jax.random.normal(jax.random.key(1), (60, 128), jnp.bfloat16)
  forced = jax.random.permutation(
    jax.random.key(2),
    jnp.tile(jnp.arange(config.num_experts), (60, 1)),
    axis=1,
    independent=True,
  )[:, :2]

  def grads(params, x):
    def loss(params, x):
      y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, found

  found = jax.jit(grads)(params, x)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
  with devices.as_if("cpu"):
    expected = jax.jit(grads)(*wide)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-2


@on_cpu
@pytest.mark.parametrize("name", LAYERS)
def test_an_interpreted_layer_is_that_of_a_cpu(name, as_hopper):
  check(LAYERS[name])


@on_cpu
@pytest.mark.parametrize("name", ["glu with biases", "mlp with biases, made anew"])
def test_a_layer_between_exchanges_is_that_of_a_cpu(name, as_hopper, monkeypatch):
  """As over a mesh: kernels in several lots of blocks, the tokens' gradient first."""
  from jmoe.kernels.grouped_ffn import hopper as ffn  # imports Pallas

  asked, ordered, between = [], [], chip._WAVES
  real = ffn._beside_exchanges
  monkeypatch.setattr(
    ffn, "_beside_exchanges", lambda *a: ordered.append(1) or real(*a)
  )
  jax.clear_caches()  # of layers that were traced as alone
  monkeypatch.setattr(chip, "waves", lambda *_: asked.append(between) or between)
  monkeypatch.setattr(carry, "through", functools.partial(carry.through, travels=True))
  check(LAYERS[name])
  jax.clear_caches()
  assert len(asked) >= 6 and between > 1 and ordered


def test_kernels_run_in_lots_where_operands_differ_between_devices():
  mesh, at = meshes.make("expert=8"), jax.sharding.PartitionSpec("expert")
  asked = []

  def local(x, same):
    asked.append((chip.waves(x), chip.waves(same), chip.waves(same, x)))
    return x

  specs = (at, jax.sharding.PartitionSpec())
  jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=at)(
    jnp.ones(8), jnp.ones(3)
  )
  assert asked == [(chip._WAVES, 1, chip._WAVES)] and chip.waves(jnp.ones(3)) == 1


@pytest.mark.contract
@pytest.mark.parametrize("waves", [1, 2, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 55, 56, 57, 100])
def test_lots_of_blocks_make_every_tile_once_in_order(count, waves):
  blocks, made = 7, []
  for wave in range(waves):
    shares = [
      share(jnp.int32(wave * blocks + n), jnp.int32(count), blocks, waves)
      for n in range(blocks)
    ]
    tiles = [
      int(first) + i * blocks for first, mine in shares for i in range(int(mine))
    ]
    assert not made or not tiles or min(tiles) > max(made)
    made += sorted(tiles)
  assert made == list(range(count))


def lowered(config, tokens=300, learning=None):
  """What a Hopper GPU runs for a layer's output, and gradients of x and parameters.

  Args:
    config: of the layer.
    tokens: how many.
    learning: the experts' parameters that are not held back; None: all.
  """
  params = jax.eval_shape(
    lambda key: narrow(jmoe.moe_init(key, config)), jax.random.key(0)
  )
  x = jax.ShapeDtypeStruct((tokens, config.d_model), jnp.bfloat16)

  def loss(params, x):
    experts = {
      name: a if learning is None or name in learning else jax.lax.stop_gradient(a)
      for name, a in params["experts"].items()
    }
    y, _ = jmoe.moe({**params, "experts": experts}, x, config, train=True)
    return jnp.sum(y.astype(jnp.float32))

  with hopper():
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


# forward and backward; a gradient over the array that it is of; choices, rows out, and
# again
KEEPS = {"rows": (7, 3), "hidden": (7, 4), "inputs": (8, 5)}


@lowers
@pytest.mark.parametrize("keep", KEEPS)
def test_a_layer_lowers_for_cuda_to_as_few_kernels(keep):
  text = lowered(simple(keep))
  products, others = KEEPS[keep]
  assert text.count("@mosaic_gpu") == products
  assert text.count("__gpu$xla.gpu.triton") == others
  assert text.count("output_operand_alias<") >= 2


# What learns of the experts -> kernels beside hidden, down; back, dx; and gathers.
LEARNING = {
  (): (0, 3),
  ("down_EFD",): (1, 3),
  ("gate_EDF",): (1, 4),
  ("up_EDF", "down_EFD"): (2, 4),
}


@lowers
@pytest.mark.parametrize("names", LEARNING)
def test_matrices_that_do_not_learn_cost_nothing(names):
  """Nor the rows that only their gradients read."""
  text = lowered(simple(), learning=names)
  products, others = LEARNING[names]
  assert text.count("@mosaic_gpu") == 4 + products
  assert text.count("__gpu$xla.gpu.triton") == others


@lowers
def test_kernels_that_write_in_place_stand_between_barriers_in_a_loop():
  """XLA:GPU fuses a slice of a loop's arrays with such a kernel and forgets the places.

  Gradients under `lax.scan` were NaN where an operand was a slice, or a result was
  written into one.
  """
  config = simple()
  shapes = jax.eval_shape(
    lambda key: narrow(jmoe.moe_init(key, config)), jax.random.key(0)
  )
  stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), shapes)
  x = jax.ShapeDtypeStruct((300, config.d_model), jnp.bfloat16)

  def loss(stacked, x):
    step = lambda x, p: (x + jmoe.moe(p, x, config, train=True)[0], None)  # noqa: E731
    return jnp.sum(jax.lax.scan(step, x, stacked)[0].astype(jnp.float32))

  with hopper():
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(stacked, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = 0
  for function in text.split("\n  func.func")[1:]:  # names are of one function
    lines = [line.strip() for line in function.splitlines()]
    barriers = [line for line in lines if "stablehlo.optimization_barrier" in line]
    guarded = {line.split(":")[0].split(" ")[0] for line in barriers}
    for line in lines:
      if "output_operand_alias<" not in line:
        continue
      calls += 1
      name = re.split("[: ]", line)[0]
      given = re.search(r"custom_call @\w+\(([^)]*)\)", line)
      assert given and {v.split("#")[0] for v in given[1].split(", ")} <= guarded
      readers = [other for other in lines if re.search(rf"{name}\b(?! =|:)", other)]
      assert readers and all(reader in barriers for reader in readers)
  assert calls >= 1 and "stablehlo.while" in text


@lowers
@pytest.mark.parametrize("axes", [("data",), ()], ids=["split", "all_the_same"])
def test_layers_trace_for_hopper_inside_shard_map(axes):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  config = jmoe.simple(256, 384, num_experts=8, k=2)
  params = jax.tree.map(
    lambda a: a.astype(jnp.bfloat16), jmoe.moe_init(jax.random.key(0), config)
  )
  spec = jax.sharding.PartitionSpec

  def layer(params, x):
    return jmoe.moe(params, x[0], config)[0][None]

  split = jax.shard_map(
    layer, mesh=mesh, in_specs=(spec(), spec(*axes)), out_specs=spec(*axes)
  )

  def loss(params, x):
    return jnp.sum(split(params, x).astype(jnp.float32))

  x = jnp.ones((8, 300, 256), jnp.bfloat16)
  with devices.as_if("hopper"):
    text = str(jax.jit(jax.grad(loss)).trace(params, x).jaxpr)
  mosaic = text.count("mpmd_map[") + text.count("core_map[")  # its name before
  assert mosaic >= 7 and "spread_rows" in text and ("psum" in text) == bool(axes)
  # Gradients of hidden arrays are written over these, from jax 0.11 on everywhere.
  assert ("run_state" in text) == (jax.__version_info__ >= (0, 11) or not axes)


@pytest.mark.accelerator
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("under", ["jit", "remat", "scan", "vmap"])
def test_a_layer_on_a_hopper_is_that_of_a_cpu(limited, under):
  """In float32 on the host, in bfloat16 here; the same choices are replayed."""
  config = jmoe.simple(
    256, 384, num_experts=8, k=2, capacity_factor=1.5 if limited else None
  )
  params = jmoe.moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (1000, 256))
  forced = jax.lax.top_k(jax.random.uniform(jax.random.key(2), (1000, 8)), 2)[1]

  def layer(params, x):
    y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
    return y

  def twice(params, x):
    if under == "scan":
      step = lambda x, _: (x + layer(params, x), None)  # noqa: E731
      return jax.lax.scan(step, x, None, length=2)[0]
    return layer(params, x)

  call = jax.checkpoint(twice) if under == "remat" else twice

  def grads(params, x):
    def loss(params, x):
      y = call(params, x).astype(jnp.float32)
      return jnp.sum(jnp.sin(y)), y

    (_, y), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, found

  narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params["experts"], x))
  narrow = ({**params, "experts": narrow[0]}, narrow[1])
  if under == "vmap":
    many = jax.tree.map(lambda a: jnp.stack([a, a]), narrow)
    found = jax.tree.map(lambda a: a[1], jax.jit(jax.vmap(grads))(*many))
  else:
    found = jax.jit(grads)(*narrow)
  cpu = jax.devices("cpu")[0]
  wide = jax.tree.map(lambda a: jax.device_put(np.asarray(a, np.float32), cpu), narrow)
  forced = jax.device_put(forced, cpu)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.default_device(cpu))
    stack.enter_context(devices.as_if("cpu"))
    expected = jax.jit(grads)(*wide)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-2
