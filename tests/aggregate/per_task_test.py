"""A gate per task over the same experts (MMoE)."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import aggregate, combine, experts, routers
from jmoe.use import use
from tests import _cases as cases, oracle
from tests._expected import expert_fn
from tests.tolerance import assert_close

T, E, M = 13, 3, 2


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def config_of(router, **more) -> jmoe.MoEConfig:
  return jmoe.MoEConfig(
    cases.D,
    E,
    router=router,
    combine=use(combine.stack),
    aggregate=use(aggregate.per_task, num_tasks=M),
    experts=cases.expert(),
    losses=(),
    **more,
  )


@pytest.mark.parametrize(
  "router", [use(routers.every_expert), use(routers.top_k, k=2)], ids=repr
)
def test_every_task_weighs_the_chosen_experts_by_its_own_softmax(router):
  config = config_of(router)
  params = cases.params_of(config)
  x = cases.draw("random", T, E).x
  y, info = jmoe.moe(params, jnp.asarray(x), config, with_plan=True)
  assert y.shape == (T, M, cases.D)
  chosen = np.asarray(info.plan.routing.expert).reshape(T, -1)
  fns = [expert_fn(params["experts"], e) for e in range(E)]
  for t in range(T):
    token = x[t].astype(np.float64)
    for m in range(M):
      gate = oracle.softmax(token @ params["aggregate"]["kernel_MDE"][m])
      expected = sum(gate[e] * fns[e](token) for e in chosen[t])
      assert_close(y[t, m], expected)


def test_tasks_learn_apart():
  config = config_of(use(routers.every_expert))
  params = cases.params_of(config)
  x = jnp.asarray(cases.draw("random", T, E).x)
  slope = jax.grad(lambda p: jnp.sum(jmoe.moe(p, x, config)[0][:, 0] ** 2))(params)
  kernel = slope["aggregate"]["kernel_MDE"]
  assert np.any(kernel[0]) and not np.any(kernel[1])


def test_an_aggregation_needs_the_experts_outputs_apart():
  with pytest.raises(ValueError, match=r"combine=use\(combine.stack\)"):
    jmoe.MoEConfig(
      8,
      E,
      router=use(routers.every_expert),
      aggregate=use(aggregate.per_task, num_tasks=2),
      experts=use(experts.mlp, d_ff=4),
    )
  with pytest.raises(ValueError, match="num_tasks=0"):
    config_of(use(routers.every_expert)).aggregate.function.check(None, num_tasks=0)
