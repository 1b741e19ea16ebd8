"""A call that cannot work is refused before any compilation, in a line that helps.

Also where the shells or other functions of the library are called.
"""
# SPDX-License-Identifier: Apache-2.0

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
  Info,
  State,
  balance,
  gates,
  init_state,
  layer,
  losses,
  moe_init,
  noise,
  restrict,
  routers,
  total_loss,
  use,
)
from jmoe.assign import priority
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models import Decoder
from tests.refusals import (
  IDS,
  X_BSD,
  D,
  E,
  T,
  X,
  call,
  check,
  choosing,
  dropless,
  hashed,
  limited,
  numbered,
  rngs,
  small,
  softly,
)

pytestmark = pytest.mark.contract

KEY = jax.random.key(0)
RESTRICTED = dropless(restrict=(use(restrict.domain, num_domains=2),))
NOISY = dropless(logit_noise=use(noise.gaussian))
BALANCED = dropless(balance=use(balance.update))


@functools.cache
def nnx_layer():
  return jmoe.nnx.MoE(small(), rngs=rngs())


def linen_call(x=X_BSD, params=None, **arguments):
  params = layer.param_shapes(small()) if params is None else params
  return jmoe.linen.MoE(small()).apply({"params": params}, x, **arguments)


@functools.cache
def balanced():
  return jmoe.nnx.MoE(BALANCED, rngs=rngs())


def info(config=None, **values):
  E = (config or small()).num_experts
  bias = jax.ShapeDtypeStruct((E,), np.float32)
  state = State(bias=bias) if config and config.balance else State()
  return Info(losses=values, load=None, dropped={}, entropy=None, state=state)


ATTENTION = Attention(num_heads=2)
BLOCKS = (BlockConfig(ATTENTION, Dense(4)), BlockConfig(ATTENTION, small()))
MODEL = ModelConfig(20, D, segments=((BLOCKS, 2),))


@functools.cache
def decoder():
  return nnx.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))


def read(tokens=None, *arrays, **arguments):
  return decoder()(
    np.ones((2, 5), int) if tokens is None else tokens, *arrays, **arguments
  )


def total(infos, weights):
  return lambda: total_loss(infos, weights)


def gate_params(kernel):
  return {**layer.param_shapes(dropless()), "gate": {"kernel_DE": kernel}}


# fmt: off
CALLS = [
  (lambda: call(x=np.ones(D, np.float32)), ValueError, ("x has shape (8,)", "[T, 8]")),
  (lambda: call(x=X_BSD), ValueError, ("x has shape (2, 3, 8)", "[T, 8]", "shells")),
  (lambda: call(x=np.ones((T, 9), np.float32)), ValueError, ("(6, 9)", "[T, 8]")),
  (lambda: call(x=np.ones((T, D), np.int32)), ValueError, ("dtype int32", "float")),
  (lambda: call(x=np.ones((T, D), np.complex64)), ValueError, ("complex64", "float")),
  (lambda: call(x=np.ones((0, D), np.float32)), ValueError, ("(0, 8)", "no tokens")),
  (lambda: call(x=X.tolist()), TypeError, ("x=[[", "not an array", "[T, 8]")),
  (lambda: call(x=None), TypeError, ("x=None", "not an array")),
  (lambda: layer.moe({}, X, {}), TypeError, ("config={}", "MoEConfig", "simple")),
  (lambda: call(params={"gate": {}}), ValueError,
   ("params['experts']['down_EFD']", "missing", "moe_init")),
  (lambda: layer.moe(None, X, small()), TypeError, ("params=None", "moe_init")),
  (lambda: call(params={**layer.param_shapes(small()), "more": {"a": X}}), ValueError,
   ("params['more']['a']", "remove it")),
  (lambda: call(params=gate_params(np.ones((D, 5), np.float32))), ValueError,
   ("params['gate']['kernel_DE']", "(8, 5)", "(8, 4)")),
  (lambda: call(params=gate_params(np.ones((D, E), np.int32))), ValueError,
   ("kernel_DE", "dtype int32", "float")),
  (lambda: call(params=gate_params(3.0)), ValueError, ("kernel_DE", "(8, 4)")),
  (lambda: call(small(shared_d_ff=4), params=layer.param_shapes(small())), ValueError,
   ("params['shared']", "missing", "moe_init")),
  (lambda: call(context={"valid": IDS}), TypeError, ("context=", "Context(valid=...)")),
  (lambda: call(context=None), TypeError, ("context=None", "Context")),
  (lambda: call(context=Context(valid=np.ones(5, bool))), ValueError,
   ("context.valid", "(5,)", "(6,)")),
  (lambda: call(context=Context(valid=np.ones((2, 3), bool))), ValueError,
   ("context.valid", "(2, 3)", "(6,)")),
  (lambda: call(context=Context(valid=IDS)), ValueError,
   ("context.valid", "int32", "bool")),
  (lambda: call(context=Context(valid=[True] * T)), TypeError,
   ("context.valid=[True", "not an array")),
  *((lambda name=name: call(context=Context(**{name: np.ones(T, np.float32)})),
     ValueError, (f"context.{name}", "float32", "integers"))
    for name in ("row", "segment", "position", "token_id", "domain_id", "task_id",
                 "modality")),
  (lambda: call(context=Context(layer=1.0)), TypeError, ("context.layer=1.0",)),
  (lambda: call(context=Context(layer=IDS)), ValueError, ("context.layer", "(6,)")),
  *((lambda n=n: call(context=Context(num_rows=n)), ValueError,
     (f"context.num_rows={n}", "whole number")) for n in (0, -2, 2.0, True)),
  (lambda: call(context=Context(num_rows=4)), ValueError,
   ("num_rows=4", "6 tokens", "row=")),
  (lambda: call(context=Context(group_size=2)), ValueError,
   ("context.group_size=2", "MoEConfig(group_size=...)")),
  (lambda: call(RESTRICTED), ValueError, ("domain needs", "Context(domain_id=...)")),
  (lambda: call(hashed()), ValueError, ("hashed needs", "Context(token_id=...)")),
  (lambda: call(hashed(), context=Context(token_id=IDS)), ValueError,
   ("hashed needs a table", "init_state")),
  (lambda: call(hashed(), context=Context(token_id=IDS, table=np.zeros(4, np.int32))),
   ValueError, ("context.table", "(4,)", "(5,)")),
  (lambda: call(hashed(), context=Context(token_id=IDS, table=np.zeros(5))), ValueError,
   ("context.table", "float64", "integers")),
  (lambda: call(hashed(), context=Context(token_id=IDS, table=np.zeros((2, 5), int))),
   ValueError, ("context.table", "Context(layer=...)")),
  (lambda: init_state(hashed(), {}), ValueError, ("hashed", "key=")),
  (lambda: call(dropless(gate=use(gates.per_modality, num_modalities=2))), ValueError,
   ("per_modality needs", "Context(modality=...)")),
  (lambda: call(dropless(losses=(use(losses.entropy_local, modality=1),))), ValueError,
   ("entropy_local needs", "Context(modality=...)")),
  (lambda: call(dropless(losses=(use(losses.load_balance, over="sequence"),))),
   ValueError, ("load_balance", "over='sequence'", "Context(num_rows=...)")),
  (lambda: call(dropless(group_size="row")), ValueError, ("num_rows=None", "by row")),
  (lambda: call(dropless(group_size="row"), context=Context(num_rows=2, row=IDS)),
   ValueError, ("num_rows=2", "no row", "valid")),
  (lambda: call(softly()), ValueError, ("num_rows=None", "by row")),
  (lambda: call(dropless(gate=use(gates.keys))), ValueError,
   ("keys", "State.gate", "init_state")),
  (lambda: call(dropless(gate=use(gates.keys)), state=State(gate={"key_ED": X})),
   ValueError, ("state.gate['key_ED']", "(6, 8)", "(4, 8)")),
  (lambda: call(BALANCED), ValueError, ("balance", "State.bias", "init_state")),
  (lambda: call(BALANCED, state=State(bias=np.zeros(5, np.float32))), ValueError,
   ("state.bias", "(5,)", "(4,)")),
  (lambda: call(BALANCED, state=State(bias=np.zeros(4, np.int32))), ValueError,
   ("state.bias", "int32", "float")),
  (lambda: call(state=None), TypeError, ("state=None", "init_state")),
  (lambda: call(NOISY, train=True), ValueError, ("gaussian()", "key=jax.random.key")),
  (lambda: call(limited(priority=use(priority.random))), ValueError,
   ("random()", "key=jax.random.key")),
  (lambda: call(dropless(router=use(routers.top_2)), train=True), ValueError,
   ("top_2()", "key=")),
  (lambda: call(NOISY, train=True, key=3), ValueError, ("key 3", "jax.random.key(0)")),
  (lambda: call(NOISY, train=True, key=np.ones(2, np.float32)), ValueError,
   ("key array([1., 1.]", "jax.random.key(0)")),
  (lambda: call(previous_logits=np.ones((T, 5), np.float32)), ValueError,
   ("previous_logits", "(6, 5)", "(6, 4)")),
  (lambda: call(residual=np.ones((T, 9), np.float32)), ValueError,
   ("residual", "(6, 9)", "(6, 8)")),
  (lambda: call(forced=np.zeros((T, 3), np.int32)), ValueError,
   ("forced", "(6, 3)", "(6, 2)")),
  (lambda: call(forced=np.zeros(12, np.int32)), ValueError, ("forced", "(6, 2)")),
  (lambda: call(forced=np.zeros((T, 2), np.float32)), ValueError,
   ("forced", "float32", "integers")),
  (lambda: call(forced=np.zeros((T, 2), bool)), ValueError, ("forced", "bool")),
  (lambda: call(forced=[[0, 1]] * T), TypeError, ("forced=[[0, 1]", "not an array")),
  (lambda: call(forced=np.zeros((3, T, 2), np.int32)), ValueError,
   ("forced", "[L, T, K]", "Context(layer=...)")),
  (lambda: call(forced=np.zeros((3, T, 1), np.int32), context=Context(layer=0)),
   ValueError, ("forced", "(3, 6, 1)", "(3, 6, 2)")),
  (lambda: call(choosing(), forced=np.zeros((T, 2), np.int32)), ValueError,
   ("forced", "(6, 2)", "(1, 4, 3)")),
  (lambda: call(choosing(), forced=np.zeros((1, 4, 2), np.int32)), ValueError,
   ("forced", "(1, 4, 2)", "(1, 4, 3)")),
  (lambda: call(softly(), context=Context(num_rows=1), forced=np.zeros((T, 1), int)),
   ValueError, ("forced", "Soft MoE", "leave it out")),
  (lambda: jax.eval_shape(lambda train: call(train=train), np.bool_(True)), TypeError,
   ("train=", "True or False", "nn.remat")),
  (lambda: call(axes=["data"]), TypeError, ("axes=['data']", "tuple")),
  (lambda: nnx_layer()(np.ones((2, 3, 9), np.float32)), ValueError,
   ("(2, 3, 9)", "[..., 8]")),
  (lambda: nnx_layer()(np.float32(1)), ValueError, ("shape ()", "[..., 8]")),
  (lambda: nnx_layer()([[1.0] * D]), TypeError, ("x=[[", "not an array")),
  (lambda: nnx_layer()(X_BSD, context={}), TypeError, ("context={}", "Context")),
  (lambda: nnx_layer()(X_BSD, context=Context(valid=np.ones((3, 2), bool))), ValueError,
   ("context.valid", "(3, 2)", "(2, 3) or (6,)")),
  (lambda: nnx_layer()(X_BSD, residual=np.ones((2, 3, 9), np.float32)), ValueError,
   ("residual", "(2, 3, 9)", "(2, 3, 8)")),
  (lambda: nnx_layer()(X_BSD, forced=np.zeros((2, 3, 2), np.int32)), ValueError,
   ("forced", "(2, 3, 2)", "Context(layer=...)")),
  (lambda: nnx_layer()(X_BSD[..., :7], context=Context(segment=IDS.reshape(2, 3))),
   ValueError, ("(2, 3, 7)", "[..., 8]")),
  (lambda: nnx_layer().update(3), TypeError, ("update", "info=3", "a call returned")),
  (lambda: linen_call(np.ones((2, 3, 9), np.float32)), ValueError,
   ("(2, 3, 9)", "[..., 8]")),
  (lambda: linen_call(context=Context(row=np.zeros((3, 2), int))), ValueError,
   ("context.row", "(3, 2)", "(2, 3) or (6,)")),
  (lambda: linen_call(params=gate_params(np.ones((D, 5), np.float32))), Exception,
   ("gate", "(8, 4)", "(8, 5)")),
  (lambda: jmoe.explain(small(), 0), ValueError, ("num_tokens=0", "at least 1")),
  (lambda: jmoe.explain(small(), 64, device="tppu"), ValueError,
   ("device='tppu'", "'tpu'")),
  (lambda: jmoe.explain({}, 64), TypeError, ("config={}", "MoEConfig")),
]

IDS_OUT = np.array([0, 4, 7, 0, 0, 0], np.int32)
BY_ROW = dropless(losses=(use(losses.load_balance, over="sequence"),))
TABLE_V = np.zeros(5, np.int32)
CHOICES = np.zeros((T, 2), np.int32)
ON_DEVICE = jnp.asarray(CHOICES + 9)

RANGES = [
  (lambda: call(forced=CHOICES + 9), ValueError, ("forced holds 9", "-1..3", "unused")),
  (lambda: call(forced=CHOICES - 2), ValueError, ("forced holds -2", "-1..3")),
  (lambda: call(forced=ON_DEVICE), ValueError, ("forced holds 9",)),
  (lambda: call(forced=np.zeros((3, T, 2), int), context=Context(layer=3)), ValueError,
   ("context.layer holds 3", "0..2")),
  (lambda: call(choosing(), forced=np.full((1, 4, 3), 6)), ValueError,
   ("forced holds token 6 in group 0", "0..5", "-1")),
  (lambda: call(choosing(group_size=3), forced=np.full((2, 4, 2), 2)), ValueError,
   ("forced holds token 2 in group 1", "3..5")),
  (lambda: call(hashed(), context=Context(token_id=IDS_OUT, table=TABLE_V)), ValueError,
   ("context.token_id holds 7", "0..4")),
  (lambda: call(hashed(), context=Context(token_id=IDS, table=TABLE_V + 4)), ValueError,
   ("context.table holds 4", "0..3")),
  (lambda: call(BY_ROW, context=Context(row=IDS_OUT, num_rows=2)), ValueError,
   ("context.row holds 4", "0..1")),
  (lambda: read(np.full((2, 5), 20)), ValueError, ("tokens holds 20", "0..19")),
  (lambda: read(np.full((2, 5), -1)), ValueError, ("tokens holds -1", "0..19")),
]

READ = [
  (lambda: call(residual=X), ValueError, ("residual", "aggregate=None", "leave")),
  (lambda: call(previous_logits=X[:, :E]), ValueError,
   ("previous_logits", "gate=linear()", "leave it out")),
  (lambda: call(dropless(gate=use(gates.mlp)), previous_logits=X[:, :E]), ValueError,
   ("previous_logits", "gate=mlp()")),
  (lambda: call(train="no"), TypeError, ("train='no'", "True or False")),
  (lambda: call(train=None), TypeError, ("train=None", "True or False")),
  (lambda: call(with_plan=[1]), TypeError, ("with_plan=[1]", "True or False")),
  (lambda: call(axes=("data",)), ValueError,
   ("axes=('data',)", "unbound", "axes=None outside shard_map")),
]

SHELLS = [
  (lambda: moe_init(small(), KEY), TypeError, ("moe_init: config=", "MoEConfig")),
  (lambda: moe_init(0, small()), ValueError, ("moe_init: key 0", "jax.random.key(0)")),
  (lambda: moe_init(KEY, {}), TypeError, ("moe_init: config={}", "MoEConfig")),
  (lambda: init_state({}, small()), TypeError, ("init_state: config={}", "MoEConfig")),
  (lambda: init_state(hashed(), {}, 0), ValueError, ("init_state: key 0",)),
  (lambda: init_state(dropless(gate=use(gates.keys)), 3), TypeError, ("params=3",)),
  (lambda: jmoe.nnx.MoE(small(), rngs=0), TypeError, ("MoE: rngs=0", "nnx.Rngs(0)")),
  (lambda: jmoe.nnx.MoE(small(), rngs=KEY), TypeError, ("MoE: rngs=", "nnx.Rngs(0)")),
  (lambda: jmoe.nnx.MoE(small(), rngs=nnx.Rngs()), ValueError,
   ("'params'", "nnx.Rngs(0)")),
  (lambda: balanced().update(info(small(num_experts=8,
    balance=use(balance.update)))), ValueError, ("update", "(8,)", "(4,)")),
  (lambda: balanced().update(info()), ValueError, ("update", "{}", "(4,)")),
  (lambda: nnx_layer().update(info(BALANCED)), ValueError, ("update", "(4,)")),
  (lambda: jmoe.linen.MoE(BALANCED).apply({"params": layer.param_shapes(BALANCED)},
    X_BSD), ValueError, ("moe_state is missing", "as init returned")),
  (lambda: jmoe.linen.MoE(BALANCED).apply({"params": layer.param_shapes(BALANCED)},
    X_BSD, mutable=["moe_state"]), ValueError, ("moe_state is missing",)),
  (lambda: jmoe.linen.MoE(small()).apply({}, X_BSD), ValueError,
   ("params['experts']", "missing")),
  (lambda: jmoe.linen.MoE(D, 16, num_experts=E, k=None), ValueError, ("k=None",)),
  (lambda: nn.remat(jmoe.linen.MoE)(D, 16, num_experts=E, k=None).apply({}, X_BSD),
   ValueError, ("k=None",)),
]

MODELS = [
  (lambda: Decoder(BLOCKS[0], rngs=nnx.Rngs(0)), TypeError,
   ("Decoder: config=", "ModelConfig")),
  (lambda: Decoder(MODEL, rngs=0), TypeError, ("Decoder: rngs=0", "nnx.Rngs(0)")),
  (lambda: decoder().update(()), ValueError, ("0 infos", "1 sparse")),
  (lambda: decoder().update(None), TypeError, ("infos=None", "1 sparse")),
  (lambda: read([[1]]), TypeError, ("tokens=[[1]]", "not an array")),
  (lambda: read(np.ones(5, int)), ValueError, ("tokens", "(5,)", "tokens[None]")),
  (lambda: read(np.ones((2, 0), int)), ValueError, ("(2, 0)", "at least one")),
  (lambda: read(np.ones((2, 5))), ValueError, ("tokens", "float64", "integers")),
  (lambda: read(None, np.ones((2, 4), int)), ValueError, ("segment", "(2, 4)")),
  (lambda: read(None, None, np.ones((2, 4), int)), ValueError, ("position", "(2, 4)")),
  *((lambda s=s: read(forced=np.zeros(s, int)), ValueError,
     (f"forced has shape {s}", "[2, 10, K]", "K=2"))
    for s in ((3, 10, 2), (1, 10, 2), (2, 9, 2), (2, 10, 3), (10, 2))),
]

TOTALS = [
  (total({"load_balance": 1.0}, {}), TypeError, ("infos={", "no Info")),
  (total([(X, info())], {}), TypeError, ("infos[0]=(", "no Info")),
  (total(3, {}), TypeError, ("infos=3", "no Info")),
  (total([info(a=1.0)], [0.1]), TypeError, ("weights=[0.1]", "dict")),
  (total([info(a=1.0)], {"a": "0.1"}), TypeError, ("'a'", "'0.1'", "number")),
  (total([info(a=1.0)], {"a": True}), TypeError, ("'a'", "True", "number")),
  (total([info(a=1.0)], {"a": float("nan")}), ValueError, ("'a'", "nan", "finite")),
  (total([info(a=1.0)], {"a": np.ones(3)}), ValueError, ("'a'", "(3,)", "one number")),
]
# fmt: on

TABLE = numbered(
  call=CALLS, range=RANGES, read=READ, shell=SHELLS, model=MODELS, total=TOTALS
)


@pytest.fixture(scope="module", autouse=True)
def compiled():
  jax.block_until_ready(nnx_layer().params())
  decoder(), balanced()


@pytest.mark.parametrize("case", TABLE)
def test_is_refused_in_one_helpful_line_before_compiling(case):
  check(*TABLE[case])


def test_what_is_right_is_not_refused():
  context = Context(
    token_id=IDS, table=np.zeros(5, np.int32), num_rows=2, row=IDS, valid=IDS == 0
  )
  x_TD = jax.ShapeDtypeStruct(X.shape, X.dtype)
  for config in (dropless(), limited(), choosing(), hashed()):
    function = functools.partial(layer.moe, config=config, context=context)
    y_TD, _ = jax.eval_shape(function, layer.param_shapes(config), x_TD)
    assert y_TD.shape == X.shape


def test_a_key_of_the_old_kind_is_a_key():
  key = jax.ShapeDtypeStruct((2,), np.uint32)
  x_TD = jax.ShapeDtypeStruct(X.shape, X.dtype)

  def function(params, x_TD, key):
    return layer.moe(params, x_TD, NOISY, train=True, key=key)[0]

  y_TD = jax.eval_shape(function, layer.param_shapes(NOISY), x_TD, key)
  assert y_TD.shape == X.shape and y_TD.dtype == jnp.float32
