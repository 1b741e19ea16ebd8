"""Rows out and home: what nobody owns is never read, whatever it holds."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import capacity, combine, dispatch, routers
from jmoe.assign import assign
from jmoe.types import Context, Home
from jmoe.use import use
from tests import _cases as cases

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
