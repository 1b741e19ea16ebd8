"""Ids out of range: refused where they can be read, counted as dropped where not."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import Context, gates, init_state, layer, use
from tests import _cases as cases
from tests.refusals import D, E, T, X, choosing, dropless, hashed, small

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def params_of(config):
  return jax.tree.map(
    lambda x: jnp.full(x.shape, 0.1, x.dtype), layer.param_shapes(config)
  )


def seen(config, forced=None, token_id=None, valid=None, table=None):
  """(largest output of each token, load, drops by restriction) of a traced call."""

  @jax.jit
  def function(forced, token_id):
    context = Context(token_id=token_id, valid=valid, table=table)
    y_TD, info = layer.moe(params_of(config), X, config, context=context, forced=forced)
    return y_TD, info.load, info.dropped

  y_TD, load, dropped = function(forced, token_id)
  assert float(sum(dropped.values())) <= 1
  return np.abs(y_TD).max(1), load.tolist(), float(dropped["restriction"])


def test_a_replayed_id_that_is_no_expert_counts_as_dropped():
  forced = np.array([[0, 9], [1, -1], [-7, 4], [2, 3], [1, 1], [9, 9]], np.int32)
  valid = np.arange(T) < T - 1
  size_T, load, restriction = seen(dropless(), forced, valid=valid)
  assert load == [1, 3, 1, 1] and (size_T > 0).tolist() == [1, 1, 0, 1, 1, 0]
  assert restriction == pytest.approx(3 / 9)  # -1 is no request, padding makes none


def test_an_id_that_is_not_in_the_table_counts_as_dropped():
  token_id = np.array([0, 1, 4, 5, 999, -1], np.int32)
  table = np.array([0, 1, 2, 3, 3], np.int32)
  size_T, load, restriction = seen(hashed(), token_id=token_id, table=table)
  assert load == [1, 1, 0, 1] and (size_T > 0).tolist() == [1, 1, 1, 0, 0, 0]
  assert restriction == 0.5


def test_a_replayed_token_of_another_group_counts_as_dropped():
  forced = np.full((2, E, 2), -1, np.int32)
  forced[0, 0] = 0, 4  # 4 is of the second group
  forced[1, 1] = 3, 6  # 6 is of none
  size_T, load, restriction = seen(choosing(group_size=3), forced)
  assert load == [1, 1, 0, 0] and (size_T > 0).tolist() == [1, 0, 0, 1, 0, 0]
  assert restriction == 0.5


def test_ids_of_padding_may_be_anything():
  valid = np.arange(T) < T - 1
  ids = np.where(valid, 0, 999).astype(np.int32)
  config = hashed()
  state = init_state(config, {}, jax.random.key(0))
  context = Context(token_id=ids, valid=valid)
  _, info = layer.moe(params_of(config), X, config, context=context, state=state)
  assert info.load.sum() == T - 1 and float(info.dropped["restriction"]) == 0


def test_previous_logits_of_padding_reach_no_gradient():
  config = dataclasses.replace(small(), gate=use(gates.mlp, residual=True), losses=())
  valid = np.arange(T) < 4
  x_TD = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)

  def loss_fn(params, logits_TE):
    y_TD, _ = layer.moe(
      params, x_TD, config, context=Context(valid=valid), previous_logits=logits_TE
    )
    return jnp.sum(y_TD**2)

  gradient = jax.jit(jax.grad(loss_fn))
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: random.normal(size=x.shape).astype(x.dtype), layer.param_shapes(config)
  )
  clean_TE = np.ones((T, E), np.float32)
  dirty_TE = np.where(valid[:, None], clean_TE, np.nan)
  clean, dirty = (gradient(params, logits) for logits in (clean_TE, dirty_TE))
  assert np.abs(clean["gate"]["previous_EE"]).max() > 0
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
