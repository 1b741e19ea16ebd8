"""The two Flax modules are one layer: same tree, same numbers, under every transform.

Comparisons are bit for bit where both sides run the same program, with the tolerance of
the dtype where a transform makes another program of it.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import jmoe
import jmoe.linen
import jmoe.nnx
from jmoe import (
  Context,
  balance,
  dispatch,
  experts,
  gates,
  join,
  layer,
  losses,
  noise,
  routers,
  use,
)
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import MoEConfig
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, F, E, B, S, L = 8, 16, 4, 2, 5, 2
PLAIN = dict(num_experts=E, k=2)
LOSSES = {"load_balance": 0.5, "router_z": 0.1}
X_BSD = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
VALID_BS = np.arange(S) < np.array([[S], [3]])
KEY = jax.random.key(7)


def of_simple(**fields):
  return dataclasses.replace(jmoe.simple(D, F, **PLAIN), **fields)


CONFIGS = {
  "plain": jmoe.simple(D, F, **PLAIN),
  "capacity": jmoe.simple(D, F, **PLAIN, capacity_factor=0.75, bias=True),
  "balance": of_simple(balance=use(balance.update, rate=0.05)),
  "random": of_simple(
    logit_noise=use(noise.gaussian),
    capacity=use(capacity.by_factor, factor=0.75),
    dispatch=use(dispatch.buckets),
    priority=use(priority.random),
  ),
  "shared": of_simple(
    shared=use(experts.mlp, d_ff=4),
    join=use(join.sigmoid_gate),
    balance=use(balance.update),
    group_size="row",
  ),
  "keys": of_simple(gate=use(gates.keys)),
  "hashed": of_simple(
    router=use(routers.hashed, vocab_size=11), renormalise=use(renormalise.never)
  ),
  "free": of_simple(
    experts=use(
      experts.with_free, base=use(experts.glu, d_ff=F), constant=1, copy=1, zero=1
    )
  ),
}


def context(config) -> Context:
  if config.group_size == "row":
    return Context(valid=VALID_BS)
  return Context(
    valid=VALID_BS,
    row=np.broadcast_to(np.arange(B)[:, None], (B, S)),
    token_id=np.arange(B * S).reshape(B, S) % 11,
  )


def filled(tree, seed=0):
  """Arrays of the shapes in a tree: cheaper than the library's own draws."""
  draw = np.random.default_rng(seed)

  def one(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype)
    return jnp.asarray(draw.integers(E, size=leaf.shape), leaf.dtype)

  return jax.tree.map(one, tree)


def module_of(make):
  """An nnx module with other contents than the library would draw."""
  graphdef, state = nnx.split(nnx.eval_shape(make))
  nnx.replace_by_pure_dict(state, filled(pure(state)))
  return nnx.merge(graphdef, state)


def both(config):
  """An nnx module, a linen module, and that one's variables from the former."""
  moe = module_of(lambda: jmoe.nnx.MoE(config, rngs=nnx.Rngs(0)))
  variables = {"params": moe.params()}
  if layer.has_state(config):
    variables["moe_state"] = {"state": moe.get_state()}
  return moe, jmoe.linen.MoE(config), variables


def objective(y_BSD, info):
  """A loss that weighs every output and every auxiliary loss."""
  weight = jnp.arange(y_BSD.size, dtype=y_BSD.dtype).reshape(y_BSD.shape) / y_BSD.size
  return jnp.sum(weight * y_BSD) + jmoe.total_loss([info], LOSSES)


def assert_equal(one, two):
  """Two trees, bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, one, two)


def pure(state):
  return nnx.to_pure_dict(state)


# -- the same layer --------------------------------------------------------------------


@pytest.mark.parametrize(
  "keywords",
  [
    PLAIN,
    dict(PLAIN, capacity_factor=1.25, eval_capacity_factor=2.0, activation=jax.nn.relu),
    dict(PLAIN, gated=False, bias=True, shared_d_ff=4),
    dict(PLAIN, balance=use(balance.update), losses=(use(losses.router_z),)),
  ],
)
def test_keywords_and_a_configuration_give_the_same_layer_in_both_shells(keywords):
  config = jmoe.simple(D, F, **keywords)
  named = nnx.eval_shape(lambda: jmoe.nnx.MoE(D, F, **keywords, rngs=nnx.Rngs(0)))
  given = nnx.eval_shape(lambda: jmoe.nnx.MoE(config, rngs=nnx.Rngs(0)))
  assert named.config == given.config == config
  assert nnx.graphdef(named) == nnx.graphdef(given)
  assert jmoe.linen.MoE(D, F, **keywords) == jmoe.linen.MoE(config)
  assert jmoe.linen.MoE(D, F, **keywords).resolved() == config


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_one_tree_of_names_shapes_and_dtypes(name):
  config = dataclasses.replace(CONFIGS[name], param_dtype="bfloat16")
  functions = layer.param_shapes(config)
  abstract = nnx.eval_shape(lambda: jmoe.nnx.MoE(config, rngs=nnx.Rngs(0)))
  of_nnx = pure(nnx.state(abstract, nnx.Param))
  variables = jax.eval_shape(
    lambda: jmoe.linen.MoE(config).init(KEY, X_BSD, context=context(config), key=KEY)
  )
  of_linen = variables["params"]

  def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  assert described(of_nnx) == described(of_linen) == described(functions)
  leaves = jax.tree.leaves(functions)
  assert leaves and all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
  assert set(variables) - {"params"} <= {"moe_state"}
  assert ("moe_state" in variables) == layer.has_state(config)


@pytest.mark.parametrize("name", ["capacity", "shared"])
def test_outputs_and_gradients_are_bit_equal_on_the_same_parameters(name):
  config = CONFIGS[name]
  moe, module, variables = both(config)
  arguments = dict(context=context(config), key=KEY, train=True)

  @nnx.jit
  def with_nnx(moe, x_BSD):
    def loss_fn(moe, x_BSD):
      y_BSD, info = moe(x_BSD, **arguments)
      return objective(y_BSD, drop_unknown(info)), (y_BSD, info)

    wrt = (nnx.DiffState(0, nnx.Param), 1)
    return nnx.grad(loss_fn, argnums=wrt, has_aux=True)(moe, x_BSD)

  @jax.jit
  def with_linen(params, x_BSD):
    def loss_fn(params, x_BSD):
      y_BSD, info = module.apply({**variables, "params": params}, x_BSD, **arguments)
      return objective(y_BSD, drop_unknown(info)), (y_BSD, info)

    return jax.grad(loss_fn, (0, 1), has_aux=True)(params, x_BSD)

  (d_nnx, dx_nnx), outcome_nnx = with_nnx(moe, jnp.asarray(X_BSD))
  (d_linen, dx_linen), outcome_linen = with_linen(variables["params"], X_BSD)
  assert_equal(outcome_nnx, outcome_linen)
  assert_equal((pure(d_nnx), dx_nnx), (d_linen, dx_linen))
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves((d_linen, dx_linen)))


@pytest.mark.parametrize("name", CONFIGS)
def test_eager_outputs_are_bit_equal_on_the_same_parameters(name):
  config = CONFIGS[name]
  moe, module, variables = both(config)
  arguments = dict(context=context(config), key=KEY, train=True)
  assert_equal(moe(X_BSD, **arguments), module.apply(variables, X_BSD, **arguments))


def drop_unknown(info):
  kept = {name: value for name, value in info.losses.items() if name in LOSSES}
  return dataclasses.replace(info, losses=dict.fromkeys(LOSSES, 0.0) | kept)


def test_without_jit_the_numbers_are_the_same():
  config = CONFIGS["capacity"]
  moe, module, variables = both(config)
  eager = moe(X_BSD, context=context(config))
  jitted = nnx.jit(lambda moe, x: moe(x, context=context(config)))(moe, X_BSD)
  assert_equal(eager, jitted)
  assert_equal(eager, module.apply(variables, X_BSD, context=context(config)))
  apply = jax.jit(functools.partial(module.apply, context=context(config)))
  assert_equal(eager, apply(variables, X_BSD))


@pytest.mark.parametrize("lead", [(2, 1, 3), ()])
def test_any_leading_dimensions_are_tokens(lead):
  config = CONFIGS["plain"]
  moe, _, _ = both(config)
  x_TD = X_BSD.reshape(-1, D)[: int(np.prod(lead, dtype=int))]
  y, info = moe(x_TD.reshape(*lead, D))
  y_TD, flat = layer.moe(moe.params(), x_TD, config)
  assert y.shape == (*lead, D)
  assert_close(y.reshape(-1, D), y_TD)
  np.testing.assert_array_equal(info.load, flat.load)


# -- a tree that moves -----------------------------------------------------------------


def test_parameters_move_between_the_shells_and_the_functions():
  config = CONFIGS["shared"]
  moe, module, _ = both(config)
  shapes = jax.eval_shape(functools.partial(module.init, KEY), X_BSD)
  of_linen = filled(shapes, seed=3)
  state = nnx.state(moe, nnx.Param)
  nnx.replace_by_pure_dict(state, of_linen["params"])
  nnx.update(moe, state)
  moe.update(dataclasses.replace(INFO, state=of_linen["moe_state"]["state"]))
  y_linen, _ = module.apply(of_linen, X_BSD)
  assert_equal(moe(X_BSD)[0], y_linen)
  y_TD, _ = layer.moe(
    of_linen["params"],
    X_BSD.reshape(-1, D),
    config,
    context=Context(num_rows=B),
    state=of_linen["moe_state"]["state"],
  )
  assert_close(y_TD.reshape(B, S, D), y_linen)


INFO = jmoe.Info(losses={}, load=None, dropped={}, entropy=None, state=jmoe.State())


def test_the_functions_draw_what_the_nnx_module_draws():
  config = CONFIGS["shared"]
  moe = jmoe.nnx.MoE(config, rngs=nnx.Rngs(5))
  assert_equal(moe.params(), layer.moe_init(nnx.Rngs(5).params(), config))


# -- transforms ------------------------------------------------------------------------

STACKED = CONFIGS["balance"]


@nnx.split_rngs(splits=L)
@nnx.vmap(in_axes=0, out_axes=0)
def stack_of_layers(rngs):
  return jmoe.nnx.MoE(STACKED, rngs=rngs)


class Step(nn.Module):
  """A layer and its residual, as linen scans it."""

  @nn.compact
  def __call__(self, x_BSD, _):
    moe = jmoe.linen.MoE(STACKED, name="moe")
    y_BSD, info = moe(x_BSD, context=context(STACKED), train=True)
    return x_BSD + y_BSD, info


def with_nnx_scan(moe, x_BSD, remat):
  """Gradient by parameters and input; output and stacked infos."""

  def step(x_BSD, moe):
    y_BSD, info = moe(x_BSD, context=context(STACKED), train=True)
    return x_BSD + y_BSD, info

  step = nnx.remat(step) if remat else step
  scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))

  def loss_fn(moe, x_BSD):
    y_BSD, info = scan(x_BSD, moe)
    return objective(y_BSD, info), (y_BSD, info)

  wrt = (nnx.DiffState(0, nnx.Param), 1)
  grad = nnx.grad(loss_fn, argnums=wrt, has_aux=True)
  (d_params, d_x), outcome = nnx.jit(grad)(moe, x_BSD)
  return (pure(d_params), d_x), outcome


def with_linen_scan(moe, x_BSD, remat):
  """The same, and the collection that the call wrote."""
  scan = nn.scan(
    nn.remat(Step) if remat else Step,
    variable_axes={"params": 0, "moe_state": 0},
    split_rngs={"params": True},
    length=L,
  )()
  moe_state = {"moe": {"state": moe.get_state()}}

  def loss_fn(params, x_BSD):
    variables = {"params": {"moe": params}, "moe_state": moe_state}
    (y_BSD, info), new = scan.apply(variables, x_BSD, None, mutable=["moe_state"])
    return objective(y_BSD, info), (y_BSD, info, new["moe_state"]["moe"]["state"])

  grad = jax.jit(jax.grad(loss_fn, (0, 1), has_aux=True))
  grads, (y_BSD, info, state) = grad(moe.params(), x_BSD)
  return grads, (y_BSD, info), state


def with_loop(moe, x_BSD):
  """The same by a Python loop over the layers."""
  bias_LE = moe.get_state().bias

  def loss_fn(params_L, x_BSD):
    infos = []
    for i in range(L):
      y_BSD, info = layer.apply(
        jax.tree.map(lambda leaf, i=i: leaf[i], params_L),
        x_BSD,
        STACKED,
        context=context(STACKED),
        state=jmoe.State(bias=bias_LE[i]),
        train=True,
      )
      x_BSD, infos = x_BSD + y_BSD, [*infos, info]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
    return objective(x_BSD, stacked), (x_BSD, stacked)

  return jax.jit(jax.grad(loss_fn, (0, 1), has_aux=True))(moe.params(), x_BSD)


def test_scans_over_layers_with_and_without_remat_agree_with_a_loop():
  moe = module_of(lambda: stack_of_layers(nnx.Rngs(0)))
  x_BSD = jnp.asarray(X_BSD)
  expected = with_loop(moe, x_BSD)
  load_LE = expected[1][1].load
  # One step of each layer's bias, however often its forward pass ran.
  before_LE = moe.get_state().bias
  bias_LE = balance.update(before_LE, load_LE, rate=0.05)
  assert bias_LE.shape == (L, E) and jnp.any(bias_LE != before_LE)
  for remat in (False, True):
    of_nnx = with_nnx_scan(moe, x_BSD, remat)
    *of_linen, state = with_linen_scan(moe, x_BSD, remat)
    # Two programs: XLA fuses, and so rounds, each in its own way.
    jax.tree.map(assert_close, of_nnx, tuple(of_linen))
    jax.tree.map(assert_close, of_nnx, expected)
    np.testing.assert_array_equal(of_nnx[1][1].load, load_LE)
    assert_equal(state.bias, bias_LE)
    assert_equal(of_nnx[1][1].state.bias, bias_LE)
  moe.update(of_nnx[1][1])
  assert_equal(moe.get_state().bias, bias_LE)


def test_vmapped_calls_are_separate_calls():
  config = CONFIGS["plain"]
  moe, module, variables = both(config)

  def one(x_SD):
    def loss_fn(x_SD):
      y_SD, info = module.apply(variables, x_SD)
      return jnp.sum(y_SD * y_SD), (y_SD, info.load)

    return jax.grad(loss_fn, has_aux=True)(x_SD)

  alone = jax.jit(one)
  each = [alone(x_SD) for x_SD in X_BSD]
  mapped = jax.jit(jax.vmap(one))(X_BSD)
  of_nnx = nnx.jit(nnx.vmap(lambda moe, x: moe(x)[0], in_axes=(None, 0)))(moe, X_BSD)
  for i, (dx_SD, (y_SD, load_E)) in enumerate(each):
    assert_close(mapped[0][i], dx_SD)
    assert_close(mapped[1][0][i], y_SD)
    np.testing.assert_array_equal(mapped[1][1][i], load_E)
    assert_close(of_nnx[i], y_SD)


# -- state and reports -----------------------------------------------------------------


def test_a_call_writes_nothing_until_it_is_told_to():
  config = CONFIGS["balance"]
  moe, module, variables = both(config)
  before = jax.tree.map(np.array, pure(nnx.state(moe)))
  _, info = moe(X_BSD, train=True)
  assert_equal(pure(nnx.state(moe)), before)
  moe.update(info)
  before_E = before["state"]["bias"]
  expected_E = balance.update(before_E, info.load, rate=0.05)
  assert_equal(moe.get_state().bias, expected_E)
  assert jnp.any(expected_E != before_E)

  (_, of_linen), new = module.apply(variables, X_BSD, train=True, mutable=["moe_state"])
  assert_equal(new["moe_state"]["state"].bias, expected_E)
  assert_equal(of_linen, info)
  frozen = module.apply(variables, X_BSD, train=True)  # not mutable: no error, no write
  assert_equal(frozen[1], info)
  _, same = module.apply(variables, X_BSD, train=False, mutable=["moe_state"])
  assert_equal(same["moe_state"]["state"].bias, before_E)


def test_two_steps_of_training_move_the_biases_of_both_shells_alike():
  config = CONFIGS["balance"]
  moe, module, variables = both(config)
  moe_state = variables["moe_state"]
  for seed in range(2):
    x_BSD = jax.random.normal(jax.random.key(seed), X_BSD.shape)
    _, info = moe(x_BSD, train=True)
    moe.update(info)
    _, new = module.apply(
      {"params": variables["params"], "moe_state": moe_state},
      x_BSD,
      train=True,
      mutable=["moe_state"],
    )
    moe_state = new["moe_state"]
  assert_equal(moe.get_state(), moe_state["state"])


@pytest.mark.parametrize("name", ["plain", "balance", "hashed"])
def test_nothing_is_sown(name):
  config = CONFIGS[name]
  moe, module, variables = both(config)
  arguments = dict(context=context(config), train=True, with_plan=True)
  (_, info), all_of_it = module.apply(variables, X_BSD, mutable=True, **arguments)
  assert set(all_of_it) == set(variables)
  graph = nnx.graphdef(moe)
  moe(X_BSD, **arguments)
  assert nnx.graphdef(moe) == graph
  assert info.plan.routing.k == config.k and info.load.shape == (E,)


def test_state_is_no_parameter():
  moe, _, _ = both(CONFIGS["balance"])
  assert set(pure(nnx.state(moe, nnx.Param))) == {"gate", "experts"}
  assert pure(nnx.state(moe, jmoe.nnx.LayerState)) == {"state": {"bias": AnyArray()}}


class AnyArray:
  def __eq__(self, other):
    return hasattr(other, "shape")


def test_linen_takes_its_random_numbers_from_the_router_stream():
  config = CONFIGS["random"]
  _, module, variables = both(config)
  arguments = dict(context=context(config), train=True)
  streams = {"router": jax.random.key(1)}
  one = module.apply(variables, X_BSD, rngs=streams, **arguments)
  two = module.apply(variables, X_BSD, rngs=streams, **arguments)
  assert_equal(one, two)
  with pytest.raises(ValueError, match="pass key="):
    module.apply(variables, X_BSD, **arguments)


def test_a_table_is_drawn_with_the_module_and_kept():
  config = CONFIGS["hashed"]
  one, two = (jmoe.nnx.MoE(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
  table_V = one.get_state().table
  assert table_V.shape == (11,) and table_V.dtype == jnp.int32
  assert jnp.any(table_V != two.get_state().table)
  init = functools.partial(jmoe.linen.MoE(config).init, context=context(config))
  assert jax.eval_shape(init, KEY, X_BSD)["moe_state"]["state"].table.shape == (11,)


def test_soft_routing_works_in_both_shells():
  config = MoEConfig(
    D,
    E,
    gate=use(gates.slots, slots_per_expert=2),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    losses=(),
  )
  moe, module, variables = both(config)
  y_BSD, info = moe(X_BSD)
  assert_equal(y_BSD, module.apply(variables, X_BSD)[0])
  assert info.load.tolist() == [2 * B] * E
