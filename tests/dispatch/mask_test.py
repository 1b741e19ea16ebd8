"""Masked hidden units are the sparse layer, to rounding, with and without drops."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe import (
  aggregate,
  capacity,
  combine,
  dispatch,
  experts,
  gates,
  renormalise,
  routers,
  use,
)
from jmoe.layer import init_state, param_shapes
from tests import _cases
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, E, T = 8, 6, 13
ONES = use(renormalise.ones)
WAYS = {
  "glu": dict(experts=use(experts.glu, d_ff=5, bias=True)),
  "ones": dict(
    gate=use(gates.keys),
    experts=use(experts.mlp, d_ff=5, bias="hidden"),
    renormalise=ONES,
  ),
  "drops": dict(
    experts=use(experts.mlp, d_ff=5, bias=True, activation=jnp.tanh),
    dispatch=use(dispatch.buckets),
    capacity=use(capacity.by_factor, factor=0.6),
  ),
}
# Messages among choices need the output of each by itself.
DAG = dict(
  aggregate=use(aggregate.dag, d_message=3, residual="outer"),
  combine=use(combine.stack),
)
WAYS["messages"] = WAYS["glu"] | DAG
WAYS["messages, drops"] = WAYS["drops"] | DAG


@pytest.mark.parametrize("name", WAYS)
def test_equals_the_layer_that_moves_rows(name):
  moving = jmoe.MoEConfig(D, E, router=use(routers.top_k, k=2), losses=(), **WAYS[name])
  masked = dataclasses.replace(moving, dispatch=use(dispatch.mask))
  with _cases.quickly():
    params = jmoe.moe_init(jax.random.key(0), moving)
    params = jax.tree.map(lambda w: w + 0.1 * jnp.cos(w * 9), params)
    x_TD = jax.random.normal(jax.random.key(1), (T, D))
    context = jmoe.Context(valid=jnp.arange(T) < T - 2)

    def both(params, x_TD, config):
      state = init_state(config, params)
      y_TD, info = jmoe.moe(params, x_TD, config, context=context, state=state)
      return jnp.sum(jnp.sin(y_TD)), (y_TD, info.dropped)

    grad = jax.grad(both, (0, 1), has_aux=True)
    one, (y_TD, dropped) = grad(params, x_TD, moving)
    other, (again_TD, _) = grad(params, x_TD, masked)
  assert (sum(dropped.values()) > 0) == ("drops" in name)
  assert_close(again_TD, y_TD)
  jax.tree.map(assert_close, other, one)


def test_stays_plain_products_under_vmap():
  config = jmoe.MoEConfig(
    D, E, router=use(routers.top_k, k=2), dispatch=use(dispatch.mask), losses=()
  )
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), param_shapes(config)
  )
  x_sTD = jax.ShapeDtypeStruct((3, T, D), jnp.float32)
  call = jax.vmap(lambda params, x: jmoe.moe(params, x, config)[0])
  text = jax.jit(call).lower(shapes, x_sTD).as_text()
  assert "stablehlo.scatter" not in text and "ragged" not in text


def test_what_it_cannot_compute_is_refused():
  free = use(experts.with_free, base=use(experts.glu, d_ff=5), zero=1)
  for fields, said in (
    (dict(experts=free), "it computes experts.mlp and experts.glu"),
    (dict(experts=use(experts.glu, d_ff=5, keep="rows")), "keep is of grouped"),
    (dict(scale="input"), "scale='input'"),
  ):
    with pytest.raises(ValueError, match=said):
      jmoe.MoEConfig(D, E, dispatch=use(dispatch.mask), **fields)


def test_explain_says_that_nothing_moves():
  text = jmoe.explain(jmoe.MoEConfig(D, E, dispatch=use(dispatch.mask)), 16)
  assert "no rows; every hidden unit" in text
