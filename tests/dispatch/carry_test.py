"""Rows out and home: what nobody owns is never read, whatever it holds."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import capacity, combine, dispatch, routers
from jmoe.assign import assign
from jmoe.dispatch import carry
from jmoe.dispatch.layout import ragged
from jmoe.types import Context, Home, Rows
from jmoe.use import use
from tests import _cases as cases
from tests.tolerance import assert_close

T, E, K, D = 13, 5, 2, 4
R = np.random.default_rng(0)
X = jnp.asarray(R.normal(size=(T, D)), jnp.float32)
LOGITS = jnp.asarray(R.normal(size=(T, E)), jnp.float32)
VALID = np.arange(T) % 4 != 3


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def planned(limited: bool, max_rows=None):
  context = Context(valid=jnp.asarray(VALID))
  scores = jax.nn.softmax(LOGITS)
  routing = routers.top_k(LOGITS, scores, scores, k=K, context=context)
  slots = use(capacity.fixed, slots=3) if limited else None
  return assign(routing, context, capacity=slots, max_rows=max_rows)


CARRIERS = {
  "sort": (use(dispatch.sort), planned(False)),
  "sort in blocks of 16": (use(dispatch.sort, block=16), planned(False)),
  "sort, bounded": (use(dispatch.sort), planned(False, max_rows=7)),
  "buckets": (use(dispatch.buckets), planned(True)),
}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("name", CARRIERS)
def test_rows_without_an_owner_may_hold_anything(name, stack):
  member, plan = CARRIERS[name]

  def total(x, weight, poison):
    def experts(rows):
      found = rows.gathered()
      owned = (rows.layout.token < T)[:, None]
      return jnp.where(owned, jnp.sin(found), poison)

    way = combine.stack(plan) if stack else Home(jnp.where(plan.kept, weight, 0))
    return jnp.sum(jnp.cos(member(x, plan, experts, way)))

  both = jax.value_and_grad(total, (0, 1))
  clean = both(X, plan.routing.weight, 0.0)
  poisoned = both(X, plan.routing.weight, jnp.nan)
  jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
  assert np.any(clean[1][0]) and not np.any(clean[1][0][~VALID])


def test_padding_rows_of_the_buffer_are_zero():
  for member, plan in CARRIERS.values():

    def experts(rows):
      found = rows.gathered()
      owned = np.asarray(rows.layout.token) < T
      assert not np.any(np.asarray(found)[~owned])
      assert np.all(np.any(np.asarray(found)[owned], axis=1))
      return found

    member(X, plan, experts, combine.weighted_sum(plan))


def test_blocks_of_any_size_give_the_same_output():
  plan = planned(False)

  def experts(rows):
    return jnp.sin(rows.gathered())

  way = combine.weighted_sum(plan)
  outs = [dispatch.sort(X, plan, experts, way, block=b) for b in (None, 1, 8, 32)]
  for out in outs[1:]:
    np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_over_choices_are_formed_in_float32(dtype):
  # In bfloat16, 256 + 1 is 256.
  scores = jnp.ones((1, 3))
  routing = routers.top_k(scores, scores, scores, k=3)
  plan = assign(routing, Context())
  big = 256.0 if dtype == "bfloat16" else 2048.0
  outputs = jnp.asarray([big, 1.0, -big], dtype)

  def experts(rows):
    order = jnp.searchsorted(
      rows.groups.start, jnp.arange(rows.layout.num_rows), side="right"
    )
    return jnp.broadcast_to(outputs[order - 1][:, None], (rows.layout.num_rows, 2))

  y = dispatch.sort(jnp.ones((1, 2), dtype), plan, experts, combine.weighted_sum(plan))
  assert y.dtype == jnp.dtype(dtype) and y.tolist() == [[1.0, 1.0]]


def test_weights_on_the_input_have_their_gradient():
  plan = planned(False)

  def total(x, weight, member):
    kept = plan.kept.astype(weight.dtype)
    way = Home(kept, input_scale=jnp.where(plan.kept, weight, 0))
    return jnp.sum(jnp.cos(member(x, plan, lambda rows: jnp.sin(rows.gathered()), way)))

  def direct(x, weight):
    live = jnp.where(plan.kept, weight, 0).reshape(T, K, 1)
    return jnp.sum(jnp.cos(jnp.sum(jnp.sin(live * x[:, None]), 1)))

  weight = plan.routing.weight
  expected = jax.grad(direct, (0, 1))(X, weight)
  found = jax.grad(lambda x, w: total(x, w, dispatch.sort), (0, 1))(X, weight)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


def carried_by_hand(x_TD, plan, experts, home):
  """A strategy of somebody's own."""
  layout = ragged(plan)
  rows_RD = experts(Rows(carry.out(x_TD, layout), layout.groups))
  return carry.home(rows_RD, home, layout)


def with_rows_anew(x_TD, plan, experts, home):
  return dispatch.sort(
    x_TD, plan, lambda rows: experts(Rows(rows.gathered(), rows.groups)), home
  )


def with_rows_added(x_TD, plan, experts, home):
  return dispatch.sort(x_TD, plan, lambda r: experts(r) + r.gathered(), home)


@functools.wraps(jmoe.experts.glu)
def wrapped(params, rows, **keywords):
  return jmoe.experts.glu(params, rows, **keywords) + rows.gathered()


def both_ways(plan):
  """Weights on the way in and on the way out."""
  weight = combine.weighted_sum(plan).weight
  return Home(0.5 * weight, input_scale=2.0 * weight)


def weighed(**fields):
  """(value, gradients) of a small layer."""
  config = dataclasses.replace(jmoe.simple(D, 8, num_experts=E, k=K), **fields)
  params = jmoe.moe_init(jax.random.key(0), config)

  def loss(params):
    return jnp.sum(jnp.sin(3 * jmoe.moe(params, X, config)[0]))

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
  "strategy", [carried_by_hand, with_rows_anew, with_rows_added, None]
)
def test_weights_are_not_lost_where_something_stands_before_the_experts(strategy):
  """Beside `einsum`, which weighs on the way home whatever the experts do."""
  experts = use(jmoe.experts.glu, d_ff=8)
  expected = use(dispatch.einsum)
  if strategy is with_rows_added or strategy is None:
    expected = use(
      lambda x, plan, experts, home: dispatch.einsum(
        x, plan, lambda r: experts(r) + r.gathered(), home
      )
    )
  given = dict(experts=use(wrapped, d_ff=8)) if strategy is None else {}
  found = weighed(dispatch=use(strategy or dispatch.sort), **given)
  slots = use(capacity.fixed, slots=T)
  wanted = weighed(dispatch=expected, capacity=slots, experts=experts)
  jax.tree.map(assert_close, found, wanted)


def test_weights_may_come_on_both_ways():
  found = weighed(combine=use(both_ways))
  slots = use(capacity.fixed, slots=T)
  wanted = weighed(
    combine=use(both_ways), dispatch=use(dispatch.einsum), capacity=slots
  )
  jax.tree.map(assert_close, found, wanted)
