"""Names of losses and their weighted sum."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import pytest

from jmoe import losses
from jmoe.losses import loss_name, total_loss
from jmoe.types import Info, State
from jmoe.use import use


def _info(**found) -> Info:
  found = {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
  zero = jnp.zeros(())
  return Info(found, jnp.zeros(2, jnp.int32), {}, zero, State())


def test_sums_over_layers_and_stacked_layers():
  infos = [_info(a=1.0, b=2.0), _info(a=[3.0, 4.0], b=[0.0, 0.0]), _info(a=5.0)]
  assert total_loss(infos, {"a": 0.5}) == 6.5
  assert total_loss(infos, {"a": 0.5, "b": 10}) == 26.5
  assert total_loss(iter(infos), {}) == 0


def test_one_info_is_as_good_as_a_list():
  assert total_loss(_info(a=[1.0, 2.0]), {"a": 2.0}) == 6


def test_weights_may_be_traced_and_gradients_flow():
  @jax.jit
  @jax.value_and_grad
  def total(weight, loss):
    return total_loss([_info(a=loss)], {"a": weight})

  value, gradient = total(jnp.float32(0.5), jnp.float32(3.0))
  assert (value, gradient) == (1.5, 3.0)


def test_unknown_name_is_an_error_with_the_nearest_one():
  infos = [_info(load_balance=1.0), _info(router_z=1.0)]
  with pytest.raises(ValueError, match="'load_balanc'.*did you mean 'load_balance'"):
    total_loss(infos, {"router_z": 1.0, "load_balanc": 0.01})
  with pytest.raises(ValueError, match="losses=()"):
    total_loss([_info()], {"load_balance": 0.01})


def test_no_infos_is_an_error():
  with pytest.raises(ValueError, match="no infos"):
    total_loss([], {"load_balance": 0.01})


def test_names_hold_scope_and_modality():
  assert loss_name(use(losses.load_balance)) == "load_balance"
  assert loss_name(use(losses.load_balance, over="batch")) == "load_balance"
  assert loss_name(use(losses.load_balance, over="sequence")) == "load_balance_sequence"
  assert loss_name(use(losses.importance, over="group")) == "importance"
  assert loss_name(use(losses.importance, over="mesh")) == "importance_mesh"
  loss = use(losses.entropy_global, modality=0, over="mesh", threshold=1.0)
  assert loss_name(loss) == "entropy_global_mesh_m0"


def own(plan, context):
  return jnp.zeros(())


def test_a_loss_of_the_user_is_named_after_its_function():
  assert loss_name(use(own)) == "own"
