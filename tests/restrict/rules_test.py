"""Restrictions by loops over experts, and what they refuse."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import experts, losses, restrict, routers, score
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases
from tests.tolerance import assert_close

T, E = 13, 12


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def _select(kind: str) -> np.ndarray:
  r = np.random.default_rng(0)
  if kind == "ties":
    return r.integers(0, 3, (T, E)).astype(np.float32)
  return {"random": 1, "huge": 1e4, "negative": -1}[kind] * r.random(
    (T, E), dtype=np.float32
  )


@pytest.mark.parametrize("kind", ["random", "ties", "huge", "negative"])
@pytest.mark.parametrize("num_groups, keep, best", [(4, 2, 1), (4, 2, 2), (3, 1, 3)])
def test_expert_groups_are_ranked_by_their_best_scores(num_groups, keep, best, kind):
  # best=1: DeepSeek-V2's maximum; best=2: V3's sum of two.
  select, size = _select(kind), E // num_groups
  mask = restrict.expert_groups(
    jnp.asarray(select), Context(), num_groups=num_groups, keep=keep, best=best
  )
  for t in range(T):
    worth = [
      np.sum(
        np.sort(select[t, g * size : (g + 1) * size])[::-1][:best], dtype=np.float32
      )
      for g in range(num_groups)
    ]
    chosen = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:keep]
    assert np.flatnonzero(mask[t]).tolist() == [
      e for e in range(E) if e // size in chosen
    ]


def test_expert_groups_are_ranked_within_what_others_allow():
  # Group 0 is best but barred, group 1 has one expert left, group 2 is whole.
  select = jnp.array([[9.0, 9.0, 5.0, 6.0, 2.0, 1.0]])
  mask = jnp.array([[False, False, False, True, True, True]])

  def chosen(keep, best):
    found = restrict.expert_groups(
      select, Context(), mask=mask, num_groups=3, keep=keep, best=best
    )
    return np.flatnonzero(found & mask).tolist()

  assert chosen(1, 1) == chosen(1, 2) == [3]
  assert chosen(2, 2) == [3, 4, 5]
  best = use(restrict.expert_groups, num_groups=3, keep=1)
  barred = use(restrict.subset, experts=(2, 3, 4, 5))
  x = jnp.zeros((2, cases.D)).at[:, :6].set(select)
  for pair in ((best, barred), (barred, best)):
    config = jmoe.MoEConfig(cases.D, 6, restrict=pair, experts=cases.expert())
    _, info = jmoe.moe(cases.params_of(config), x, config)
    assert info.load.tolist() == [0, 0, 2, 2, 0, 0]
    assert float(info.dropped["restriction"]) == 0


@pytest.mark.parametrize("rescore", [False, True])
def test_a_token_that_no_expert_may_serve_enters_no_loss(rescore):
  listed = (
    use(losses.load_balance),
    use(losses.router_z),
    use(losses.importance),
    use(losses.entropy_local),
  )
  config = jmoe.MoEConfig(
    cases.D,
    4,
    restrict=(use(restrict.domain, num_domains=2),),
    rescore=rescore,
    losses=listed,
    experts=cases.expert(),
  )
  params = cases.params_of(config)
  x = jnp.asarray(cases.draw("random", 7, 4).x)

  def outcome(x, **context):
    def total(params, x):
      _, info = jmoe.moe(params, x, config, context=Context(**context))
      return sum(info.losses.values()), info

    (_, info), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)
    return info, gradients

  domain = jnp.array([0, 1, 7, 0, 1, 0, 1])  # the third belongs to none
  info, gradients = outcome(x, domain_id=domain)
  served = np.arange(7) != 2
  alone, (d_params, d_x) = outcome(x[served], domain_id=domain[served])
  for name, loss in alone.losses.items():
    assert_close(info.losses[name], loss, name)
  assert_close(info.entropy, alone.entropy)
  assert_close(gradients[0]["gate"]["kernel_DE"], d_params["gate"]["kernel_DE"])
  assert_close(gradients[1][served], d_x)
  assert not np.any(gradients[1][2])


def test_the_two_rules_for_expert_groups_differ():
  select = jnp.array([[0.9, 0.0, 0.5, 0.6]])
  both = [
    restrict.expert_groups(select, Context(), num_groups=2, keep=1, best=best).tolist()
    for best in (1, 2)
  ]
  assert both == [[[True, True, False, False]], [[False, False, True, True]]]


def test_the_bias_that_selects_also_ranks_expert_groups():
  config = jmoe.MoEConfig(
    cases.D,
    4,
    router=use(routers.top_k, k=2),
    score=use(score.sigmoid),
    restrict=(use(restrict.expert_groups, num_groups=2, keep=1),),
    balance=use(jmoe.balance.update, rate=0.1),
    experts=cases.expert(),
  )
  x = jnp.zeros((3, cases.D))
  for bias, chosen in (([0, 0, 0, 1.0], [3, 2]), ([0.1, 0.1, 0.0, 0.0], [0, 1])):
    state = jmoe.State(bias=jnp.asarray(bias))
    _, info = jmoe.moe(cases.params_of(config), x, config, state=state, with_plan=True)
    assert info.plan.routing.expert.reshape(3, 2).tolist() == [chosen] * 3


def test_a_domain_owns_a_block_and_shares_the_last_experts():
  domain = jnp.array([0, 1, 2, 3, -1, 7])
  mask = restrict.domain(
    jnp.zeros((6, 10)), Context(domain_id=domain), num_domains=4, shared=2
  )
  allowed = [np.flatnonzero(row).tolist() for row in mask]
  assert (
    allowed == [[0, 1, 8, 9], [2, 3, 8, 9], [4, 5, 8, 9], [6, 7, 8, 9]] + [[8, 9]] * 2
  )


@pytest.mark.parametrize("train", [False, True])
def test_a_subset_scored_anew_is_the_layer_with_the_others_cut_away(train):
  keep, num_experts = (4, 0, 2), 5
  whole = jmoe.MoEConfig(
    cases.D,
    num_experts,
    restrict=(use(restrict.subset, experts=keep),),
    rescore=True,
    experts=use(experts.glu, d_ff=cases.F),
  )
  cut = jmoe.MoEConfig(cases.D, len(keep), experts=whole.experts)
  params = cases.params_of(whole)
  order = sorted(keep)
  r = np.random.default_rng(1)
  params["gate"] = {"kernel_DE": r.normal(size=(cases.D, 5)).astype(np.float32)}
  small = {
    "gate": {"kernel_DE": params["gate"]["kernel_DE"][:, order]},
    "experts": {name: a[np.array(order)] for name, a in params["experts"].items()},
  }
  x = jnp.asarray(cases.draw("random", T, 5).x)
  y, info = jmoe.moe(params, x, whole, train=train)
  expected, other = jmoe.moe(small, x, cut, train=train)
  assert_close(y, expected)
  assert info.load[np.array(order)].tolist() == other.load.tolist()
  assert int(info.load.sum()) == int(other.load.sum())
  assert_close(info.losses["router_z"], other.losses["router_z"])
  assert float(info.dropped["restriction"]) == 0


def test_intersected_restrictions_that_leave_too_few_are_counted():
  config = jmoe.MoEConfig(
    cases.D,
    6,
    router=use(routers.top_k, k=2),
    restrict=(
      use(restrict.domain, num_domains=3),
      use(restrict.subset, experts=(0, 1, 2)),
    ),
    experts=cases.expert(),
  )
  domain = jnp.arange(12, dtype=jnp.int32) % 3  # two, one and no experts left
  x = jnp.asarray(cases.draw("random", 12, 6).x)
  y, info = jmoe.moe(
    cases.params_of(config),
    x,
    config,
    context=Context(domain_id=domain),
    with_plan=True,
  )
  live = np.asarray(info.plan.routing.live).reshape(12, 2).sum(1)
  assert live.tolist() == [2, 1, 0] * 4
  assert_close(info.dropped["restriction"], 12 / 24)
  assert not np.any(y[2::3]) and np.all(np.any(np.asarray(y[1::3]), axis=1))


@pytest.mark.parametrize(
  "member, match",
  [
    (use(restrict.expert_groups, num_groups=5, keep=1), "use a divisor"),
    (use(restrict.expert_groups, num_groups=4, keep=5), "keep=5"),
    (use(restrict.expert_groups, num_groups=4, keep=1, best=4), "use 1 to 3"),
    (use(restrict.expert_groups, num_groups=12, keep=3, best=1), "use keep=4"),
    (use(restrict.domain, num_domains=5), "not a multiple"),
    (use(restrict.domain, num_domains=6, shared=0), "fewer than k=4"),
    (use(restrict.subset, experts=(0, 1, 2)), "keep 4 or more"),
    (use(restrict.subset, experts=(0, 1, 2, 12)), "in 0..11"),
    (use(restrict.subset, experts=(0, 1, 2, 2)), "distinct"),
  ],
  ids=repr,
)
def test_what_cannot_leave_k_experts_is_refused(member, match):
  with pytest.raises(ValueError, match=match):
    jmoe.MoEConfig(
      8, E, router=use(routers.top_k, k=4), restrict=(member,), experts=cases.expert()
    )


def test_restrictions_have_no_gradient():
  def total(select):
    mask = restrict.expert_groups(select, Context(), num_groups=3, keep=1)
    return jnp.sum(jnp.where(mask, 1.0, 0.0))

  assert not np.any(jax.grad(total)(jnp.asarray(_select("random"))))
