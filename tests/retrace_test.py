"""A configuration is a value to jax too: an equal one is traced and compiled once."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jmoe
import jmoe.linen
import jmoe.nnx
from jmoe import Context, balance, dispatch, layer, losses, restrict, routers, use
from jmoe.assign import capacity, priority
from jmoe.kernels import devices
from jmoe.use import from_json, to_json
from tests.compilations import COMPILED

pytestmark = pytest.mark.contract

TRACED: list[str] = []


def counting_gelu(x):
  """An activation that notes every trace of the experts."""
  TRACED.append("experts")
  return jax.nn.gelu(x)


def make_config(**fields):
  """The same configuration, built from scratch at every call."""
  config = jmoe.simple(8, 16, num_experts=4, k=2, gated=False, activation=counting_gelu)
  config = dataclasses.replace(
    config,
    restrict=(use(restrict.expert_groups, num_groups=2, keep=1),),
    losses=(use(losses.load_balance), use(losses.router_z)),
    balance=use(balance.update, rate=1e-2),
  )
  return dataclasses.replace(config, **fields)


@contextlib.contextmanager
def counted():
  """Numbers of traces and of compilations inside the block, in a dict."""
  TRACED.clear()
  COMPILED.clear()
  found: dict[str, int] = {}
  yield found
  found.update(traces=len(TRACED), compilations=len(COMPILED))


@pytest.fixture(autouse=True)
def fresh():
  layer._moe.clear_cache()


def inputs(config, seed=0, tokens=6):
  key = jax.random.key(seed)
  params = layer.moe_init(key, config)
  x_TD = jax.random.normal(jax.random.fold_in(key, 1), (tokens, 8))
  state = layer.init_state(config, params)
  return jax.block_until_ready((params, x_TD, state))


def call(config, params, x_TD, state, **arguments):
  y_TD, info = layer.moe(params, x_TD, config, state=state, **arguments)
  return jax.block_until_ready((y_TD, info.load, info.losses))


def test_the_counter_counts():
  config, made = make_config(), inputs(make_config())
  with counted() as found:
    call(config, *made)
  assert found["traces"] >= 1 and found["compilations"] == 1


def test_an_equal_configuration_is_traced_once():
  made = inputs(make_config())
  call(make_config(), *made)
  with counted() as found:
    call(make_config(), *made)
    call(dataclasses.replace(make_config()), *made)
    call(from_json(to_json(make_config()), allow=(__name__,)), *made)
  assert found == dict(traces=0, compilations=0)


def test_other_data_and_another_routing_compile_nothing():
  config = make_config()
  params, x_TD, state = inputs(config)
  valid = jnp.arange(6) < 4
  context = Context(valid=valid, position=jnp.arange(6))
  collapsed = jax.tree.map(jnp.zeros_like, params)  # ties: everyone to expert 0 and 1
  drawn = inputs(config, seed=3)
  other = Context(valid=~valid, position=jnp.arange(6)[::-1])
  biased = dataclasses.replace(state, bias=jnp.array([0.0, 0, 9, 0]))
  jax.block_until_ready((collapsed, other, biased))
  loads = [call(config, params, x_TD, state, context=context)[1]]
  with counted() as found:
    loads.append(call(config, collapsed, x_TD, state, context=context)[1])
    loads.append(call(config, *drawn, context=context)[1])
    loads.append(call(config, params, x_TD, state, context=other)[1])
    loads.append(call(config, params, x_TD, biased, context=context)[1])
  assert found == dict(traces=0, compilations=0)
  assert len({tuple(load.tolist()) for load in loads}) > 1


def test_what_is_static_does_compile_anew():
  config = make_config()
  params, x_TD, state = inputs(config)
  call(config, params, x_TD, state)
  longer = inputs(config, tokens=7)[1]
  changed = make_config(losses=(use(losses.router_z),))
  with counted() as found:
    call(config, params, longer, state)
    call(changed, params, x_TD, state)
    call(config, params, x_TD, state, train=True)
  assert found["compilations"] == 3


def test_a_layer_is_traced_for_each_device():
  """What is chosen by `current_device` is not that of the device before."""
  config = make_config()
  params, x_TD, state = inputs(config)
  for device in ("cpu", "tpu"):
    with devices.as_if(device), counted() as found:
      jax.eval_shape(
        lambda *given: layer.moe(*given, config, state=state), params, x_TD
      )
    assert found["traces"] > 0


def test_layers_with_equal_configurations_share_a_trace():
  one, two = make_config(), make_config()
  x_TD = inputs(one)[1]
  first, second = inputs(one, seed=1), inputs(two, seed=2)

  @jax.jit
  def stack(x_TD):
    for config, (params, _, state) in ((one, first), (two, second)):
      x_TD = x_TD + layer.moe(params, x_TD, config, state=state)[0]
    return x_TD

  with counted() as found:
    stack(x_TD)
  once = found["traces"]
  with counted() as found:
    layer._moe.clear_cache()
    jax.jit(lambda x_TD: layer.moe(first[0], x_TD, one, state=first[2])[0])(x_TD)
  assert once == found["traces"] > 0


def test_modules_with_equal_configurations_share_a_trace():
  one = jmoe.nnx.MoE(make_config(), rngs=nnx.Rngs(0))
  two = jmoe.nnx.MoE(make_config(), rngs=nnx.Rngs(1))
  linen = jmoe.linen.MoE(make_config())
  x_BSD = jnp.ones((2, 3, 8))
  variables = {
    "params": two.params(),
    "moe_state": {"state": two.get_state()},
  }
  jax.block_until_ready(one(x_BSD)[0])
  with counted() as found:
    jax.block_until_ready(two(x_BSD)[0])
    jax.block_until_ready(linen.apply(variables, x_BSD)[0])
  assert found == dict(traces=0, compilations=0)


def test_a_training_step_with_the_balance_update_compiles_once():
  moe = jmoe.nnx.MoE(make_config(), rngs=nnx.Rngs(0))
  x_BSD = jax.random.normal(jax.random.key(1), (2, 3, 8))
  new_BSD = jax.block_until_ready(x_BSD + 1)

  @nnx.jit
  def step(moe, x_BSD):
    def loss_fn(moe):
      y_BSD, info = moe(x_BSD, train=True)
      return jnp.sum(y_BSD) + jmoe.total_loss([info], {"load_balance": 0.01}), info

    (_, info), grads = nnx.value_and_grad(loss_fn, has_aux=True)(moe)
    moe.update(info)
    return grads

  jax.block_until_ready(nnx.state(step(moe, x_BSD)))
  with counted() as found:
    for _ in range(3):
      jax.block_until_ready(nnx.state(step(moe, new_BSD)))
  assert found == dict(traces=0, compilations=0)


@pytest.mark.parametrize(
  "fields",
  [
    dict(
      router=use(routers.top_2, policy="random"),
      dispatch=use(dispatch.buckets),
      capacity=use(capacity.by_factor, factor=1.0),
      priority=use(priority.random),
    ),
    dict(dispatch=use(dispatch.sort), max_rows=0.5),
  ],
  ids=["random", "bounded"],
)
def test_another_key_and_other_drops_compile_nothing(fields):
  config = make_config(**fields)
  params, x_TD, state = inputs(config)
  keys = jax.block_until_ready(list(jax.random.split(jax.random.key(0), 4)))
  call(config, params, x_TD, state, key=keys[0], train=True)
  with counted() as found:
    for key in keys[1:]:
      call(config, params, x_TD, state, key=key, train=True)
  assert found == dict(traces=0, compilations=0)
