"""Load balance: which choices count, and which routers it fits."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import experts, losses, use
from jmoe.types import Context
from tests import _cases
from tests.losses import cases
from tests.losses.cases import draw


def _plan(case):
  return cases.args(case)[0]


def test_one_expert_taking_all_gives_num_experts():
  logits = np.full((12, 4), -50.0)
  logits[:, 2] = 50
  case = draw(12, 4, 1, logits=logits, chosen=np.full((12, 1), 2))
  case.live[:] = case.valid[:] = True
  assert losses.load_balance(_plan(case), Context()) == 4


def test_first_counts_first_choices_only():
  # Everybody's first choice is expert 0, second choices are spread over the others.
  chosen = np.stack([np.zeros(12), 1 + np.arange(12) % 3], axis=1)
  case = draw(12, 4, 2, logits=np.zeros((12, 4)), chosen=chosen)
  case.live[:] = case.valid[:] = True
  case.logits[:, 0] = 50.0
  plan, context = _plan(case), Context()
  assert losses.load_balance(plan, context, choices="first") == 4
  assert losses.load_balance(plan, context, choices="all") == 2


def test_skipped_choices_do_not_count():
  case = draw(12, 4, 2, logits=np.tile([2.0, 1.0, 0.0, 0.0], (12, 1)))
  case.chosen[:] = [0, 1]
  case.valid[:] = True
  case.live[:] = [True, False]
  first = losses.load_balance(_plan(case), Context(), choices="first")
  assert losses.load_balance(_plan(case), Context(), choices="all") == first


def test_rows_need_not_be_consecutive():
  case = draw(15, 3, 2, seed=2, row=np.arange(15) % 3)
  values, _ = cases.evaluate(case, "sequence")
  expected = cases.expected(case, "load_balance", "sequence")
  np.testing.assert_allclose(values["load_balance"], expected, rtol=1e-5)


def test_expert_choice_is_an_error_that_names_the_remedy():
  plan = _plan(draw(15, 3, 2))
  plan = dataclasses.replace(plan, routing=dataclasses.replace(plan.routing, k=None))
  with pytest.raises(ValueError, match="leave load_balance out"):
    losses.load_balance(plan, Context())
  with pytest.raises(ValueError, match="leave load out"):
    losses.load(plan, Context())


def test_unknown_choices_are_an_error():
  with pytest.raises(ValueError, match="choices='second'"):
    losses.load_balance(_plan(draw(15, 3, 2)), Context(), choices="second")


@pytest.fixture
def by_operation():
  with _cases.by_operation():
    yield


def test_choices_are_gathered_over_the_batches_of_an_update(by_operation):
  loss = use(losses.load_balance, accumulate=3)
  config = jmoe.MoEConfig(8, 4, experts=use(experts.mlp, d_ff=4), losses=(loss,))
  params = jmoe.moe_init(jax.random.key(0), config)
  params["gate"] = {"kernel_DE": 2 * jnp.eye(8, 4)}
  state, counts = jmoe.init_state(config, params), np.zeros(4)
  for n in range(4):
    if n == 3:  # the next update
      counts[:] = 0
    x = jax.random.normal(jax.random.key(n), (6, 8))
    _, info = jmoe.moe(params, x, config, state=state, train=True, with_plan=True)
    counts += np.asarray(info.load)
    mean = np.asarray(info.plan.routing.probs, np.float64).mean(0)
    expected = 4 * (counts / counts.sum()) @ mean
    np.testing.assert_allclose(info.losses["load_balance"], expected, rtol=1e-5)
    state = info.state
  _, again = jmoe.moe(params, x, config, state=state)  # evaluation gathers nothing
  np.testing.assert_array_equal(again.state.counted, state.counted)
  alone = 4 * (np.asarray(info.load) / 12) @ mean
  np.testing.assert_allclose(again.losses["load_balance"], alone, rtol=1e-5)
  with pytest.raises(ValueError, match="needs State.counted"):
    jmoe.moe(params, x, config, train=True)


@pytest.mark.parametrize(
  "given, match",
  [
    (dict(accumulate=0), "accumulate=0"),
    (dict(accumulate=2, over="sequence"), "over='sequence'"),
    (dict(accumulate=2, choices="first"), "choices='first'"),
  ],
)
def test_what_cannot_be_gathered_is_refused(given, match):
  with pytest.raises(ValueError, match=match):
    jmoe.MoEConfig(8, 4, losses=(use(losses.load_balance, **given),))
