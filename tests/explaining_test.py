"""`explain` says in a few lines what the layer then does."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe import dispatch, explain, gates, layer, losses, noise, routers, use
from jmoe.assign import renormalise
from jmoe.config import MoEConfig
from jmoe.kernels.grouped_matmul import choose
from jmoe.types import Groups
from tests.compilations import COMPILED

pytestmark = pytest.mark.contract

T = 64
DROPLESS = jmoe.simple(16, 32, num_experts=4, k=2)
LIMITED = jmoe.simple(16, 32, num_experts=4, k=1, capacity_factor=1.25)
CHOOSING = MoEConfig(
  16,
  4,
  router=use(routers.expert_choice, capacity_factor=2.0),
  renormalise=use(renormalise.never),
  dispatch=use(dispatch.buckets),
  losses=(),
)
SOFT = MoEConfig(
  16,
  4,
  gate=use(gates.slots, slots_per_expert=2),
  router=use(routers.soft),
  dispatch=use(dispatch.mix),
  losses=(),
)


def line(text: str, stage: str) -> str:
  """The line of a stage."""
  return next(found for found in text.splitlines() if found.startswith(f"{stage} "))


def test_stages_are_in_the_order_of_the_flow():
  text = explain(DROPLESS, T)
  stages = [found.split()[0] for found in text.splitlines()[1:-1]]
  assert stages == [
    "gate",
    "score",
    "router",
    "priority",
    "capacity",
    "renormalise",
    "dispatch",
    "experts",
    "combine",
    "losses",
  ]
  assert "top_k(k=2)" in line(text, "router")
  assert "2 of 4 experts" in line(text, "router")
  assert line(text, "losses").split()[1:] == ["load_balance,", "router_z"]


@pytest.mark.parametrize(
  ("config", "slots"), [(LIMITED, 20), (CHOOSING, 32)], ids=["capacity", "choice"]
)
def test_slots_and_rows_are_those_of_the_plan(config, slots):
  text = explain(config, T, device="cpu")
  assert f"{slots} slots for each expert" in line(text, "capacity")
  params = layer.param_shapes(config)
  x_TD = jax.ShapeDtypeStruct((T, 16), jnp.float32)

  def plan_of(params, x_TD):
    return layer.moe(params, x_TD, config, with_plan=True)[1].plan

  plan = jax.eval_shape(plan_of, params, x_TD)
  assert plan.capacity == slots
  rows = int(re.search(r"(\d+) rows", line(text, "dispatch")).group(1))
  assert rows >= 4 * slots
  times = float(re.search(r"([\d.]+) x", line(text, "dispatch")).group(1))
  assert times == pytest.approx(rows / plan.routing.expert.shape[0], abs=0.006)


def test_routing_groups_multiply_the_slots():
  text = explain(dataclasses.replace(LIMITED, group_size=16), T)
  assert "5 slots for each expert in each of 4 groups" in line(text, "capacity")
  by_row = dataclasses.replace(LIMITED, group_size="row")
  assert "in each of 2 groups" in line(explain(by_row, T, num_rows=2), "capacity")


def test_a_dropless_layer_and_a_bounded_one_say_so():
  assert "dropless" in line(explain(DROPLESS, T), "capacity")
  bounded = dataclasses.replace(DROPLESS, max_rows=0.5)
  assert "max_rows=0.5" in line(explain(bounded, T), "capacity")
  assert "nothing is dropped" in line(explain(DROPLESS, T), "priority")
  assert "nothing is dropped" not in line(explain(bounded, T), "priority")


@pytest.mark.parametrize(
  ("config", "share"),
  [(DROPLESS, 2 / 4), (LIMITED, 1 / 4), (CHOOSING, 2 / 4), (SOFT, 8 / T / 4)],
  ids=["dropless", "capacity", "choice", "soft"],
)
def test_parameters_are_counted_in_total_and_as_a_token_meets_them(config, share):
  shapes = layer.param_shapes(config)
  counts = {
    name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
    for name, part in shapes.items()
  }
  total = sum(counts.values())
  active = round(total - (1 - share) * counts["experts"])
  assert f"{total:,} parameters, {active:,} active" in explain(config, T)


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("config", [DROPLESS, LIMITED], ids=["dropless", "capacity"])
def test_names_the_grouped_matmul_of_the_device_and_why(device, config):
  capacity = None if config.capacity is None else 24
  block = 128 if device == "tpu" else 8
  name, why, _ = choose(device, Groups(None, None, block, capacity), 4)
  told = line(explain(config, T, device=device), "experts")
  assert f"matmul: {name} ({why}" in told


def test_an_expert_every_token_takes_is_a_plain_product():
  config = dataclasses.replace(jmoe.simple(16, 32, num_experts=4, shared_d_ff=8))
  assert "every token; matmul: batched" in line(explain(config, T), "shared")
  assert "join" in explain(config, T) and "join" not in explain(DROPLESS, T)


def test_training_has_its_own_capacity_and_noise():
  config = jmoe.simple(
    16,
    32,
    num_experts=4,
    capacity_factor=1.0,
    eval_capacity_factor=2.0,
    logit_noise=use(noise.gaussian),
  )
  training, outside = explain(config, T, train=True), explain(config, T)
  assert "32 slots" in line(training, "capacity")
  assert "64 slots" in line(outside, "capacity")
  assert "only in training" in line(outside, "logit_noise")
  assert "only in training" not in training


def test_soft_routing_shows_only_the_stages_it_has():
  text = explain(SOFT, T)
  assert [found.split()[0] for found in text.splitlines()[1:-1]] == [
    *("gate", "router", "dispatch", "experts")
  ]


def test_no_losses_are_called_none():
  text = explain(dataclasses.replace(DROPLESS, losses=()), T)
  assert line(text, "losses").split() == ["losses", "none"]
  scoped = dataclasses.replace(
    DROPLESS, losses=(use(losses.load_balance, over="mesh"), use(losses.router_z))
  )
  assert "load_balance_mesh, router_z" in line(explain(scoped, T), "losses")


def test_nothing_is_compiled_and_no_memory_is_taken():
  big = jmoe.simple(8192, 32768, num_experts=256, k=8)  # 800 GB of parameters
  COMPILED.clear()
  assert "206,160,527,360 parameters" in explain(big, 2**20)
  assert not COMPILED
