"""The capacity rules, by name, and everything that may be asked of them."""
# SPDX-License-Identifier: Apache-2.0

import fractions
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import capacity, dispatch, routers
from jmoe.assign import assign
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases, oracle

# Where a system's minimum or alignment is an option here.
OPTIONS = {"flaxformer": dict(minimum=4), "deepspeed": dict(minimum=4)}
NAMES = {"fairseq": "fairseq_train"}


@pytest.mark.parametrize("rule", capacity.RULES, ids=lambda rule: rule.__name__)
def test_rules_equal_the_oracles_for_any_size(rule):
  name = rule.__name__
  options = OPTIONS.get(name, {})
  expected = oracle.CAPACITY_RULES[NAMES.get(name, name)]
  sizes = (range(1, 40, 3), (1, 3, 7, 8), (1, 2, 3), (0.25, 1.0, 1.25, 2.0))
  for T, E, k, factor in itertools.product(*sizes):
    found = capacity.by_factor(T, E, k, factor=factor, rule=rule, **options)
    assert int(found) == expected(T, E, k, factor), (T, E, k, factor)


def test_ours_rounds_up_the_exact_quotient():
  assert int(capacity.ceil(100, 10, 1, 1.1)) == 11  # as floats 11.000000000000002
  sizes = ((7, 100, 1000, 4096), (2, 3, 5, 7, 10, 128), (1, 2, 6, 8))
  for T, E, k in itertools.product(*sizes):
    for factor in ("0.1", "0.3", "0.7", "1.05", "1.1", "1.2", "1.3", "1.7", "2.0"):
      exact = math.ceil(k * T * fractions.Fraction(factor) / E)
      assert int(capacity.ceil(T, E, k, float(factor))) == exact, (T, E, k, factor)


@pytest.mark.parametrize(
  "member, slots",
  [
    *(
      (use(capacity.by_factor, factor=f, rule=rule, minimum=minimum), slots)
      for f in (1e4, 1e30, 1e308)
      for rule, minimum, slots in (
        (capacity.ceil, 0, 10), (capacity.vmoe, 0, 12), (capacity.flaxformer, 4, 10)
      )
    ),
    (use(capacity.by_factor, factor=1e30, multiple_of=8), 16),
    (use(capacity.by_factor, factor=1.0, minimum=10**30), 10),
    (use(capacity.by_factor, factor=1e30, per_expert=(1.0, 1e-30)), (10, 5)),
    (use(capacity.fixed, slots=10**30), 10),
    (use(capacity.by_factor, factor=0.4), 2),
  ],
  ids=repr,
)  # fmt: skip
def test_an_expert_has_no_more_slots_than_its_group_has_tokens(member, slots):
  logits = jnp.zeros((20, 2)).at[:, 0].set(1.0)  # all tokens to expert 0
  for valid in (None, jnp.arange(20) % 10 < 9):
    context = Context(valid=valid, group_size=10)
    routing = routers.top_k(logits, logits, logits, k=1, context=context)
    plan = assign(routing, context, capacity=member)
    assert plan.capacity == slots
    served = min(10 if valid is None else 9, np.max(slots))
    assert plan.rows.tolist() == [[served, 0]] * 2


def test_a_huge_factor_gives_a_number_of_slots():
  for rule in (*capacity.RULES, capacity.fairseq_eval):
    assert 10 <= int(rule(10, 2, 1, 1e30)) <= 2**31, rule
  chosen = routers.expert_choice(*[jnp.zeros((10, 2))] * 3, capacity_factor=1e30)
  assert chosen.capacity == 10 and chosen.live.all()


def test_the_worked_value_of_every_rule():
  T, E, k, factor = (oracle.WORKED[n] for n in ("tokens", "experts", "k", "factor"))
  for rule in capacity.RULES:
    name = NAMES.get(rule.__name__, rule.__name__)
    assert int(rule(T, E, k, factor)) == oracle.WORKED_CAPACITY[name]
  found = capacity.fairseq_eval(T, E, k, 0.25)
  assert int(found) == oracle.WORKED_CAPACITY["fairseq_eval"]
  for rule in capacity.RULES:  # and so its docstring says
    assert f"{rule.__name__}" in capacity.__doc__


def test_evaluation_has_a_factor_and_a_rule_of_its_own():
  member = use(
    capacity.by_factor,
    factor=1.0,
    eval_factor=0.25,
    rule=capacity.fairseq,
    eval_rule=capacity.fairseq_eval,
  )
  assert int(member(100, 4, 2, train=True)) == 50
  assert int(member(100, 4, 2, train=False)) == 25
  same = use(capacity.by_factor, factor=1.5)
  assert int(same(8, 4, 1, train=False)) == int(same(8, 4, 1, train=True)) == 3
  config = cases.config_of(
    dict(router="top_k 1", capacity="ceil", dispatch="buckets"),
    3,
    capacity=use(capacity.by_factor, factor=0.5, eval_factor=2.0),
  )
  x, params = jnp.asarray(cases.draw("random", 13, 3).x), cases.params_of(config)
  slots = [
    jmoe.moe(params, x, config, train=train, with_plan=True)[1].plan.capacity
    for train in (True, False)
  ]
  assert slots == [3, 9]


def test_minimum_comes_before_alignment():
  found = capacity.by_factor(10, 4, 1, factor=1.0, minimum=5, multiple_of=4)
  assert int(found) == 8
  assert int(capacity.by_factor(10, 4, 1, factor=1.0, multiple_of=4)) == 4


def test_experts_may_differ_in_their_share():
  found = capacity.by_factor(12, 3, 1, factor=1.0, per_expert=(0.5, 1.0, 2.0))
  assert found.tolist() == [2, 4, 8]
  many = capacity.by_factor(np.arange(13), 3, 1, factor=1.0, per_expert=(0.5, 1.0, 2.0))
  assert many.shape == (13, 3) and many[12].tolist() == [2, 4, 8]


@pytest.mark.parametrize(
  "member",
  [
    use(capacity.by_factor, factor=1.1),
    use(capacity.by_factor, factor=0.3, rule=capacity.lingvo),
    use(capacity.by_factor, factor=1.0, rule=capacity.tutel, multiple_of=3),
    use(capacity.by_factor, factor=1.0, per_expert=(0.5, 1.0, 3.0)),
    use(capacity.fixed, slots=4),
  ],
  ids=repr,
)
def test_a_counted_capacity_is_the_rule_of_that_count(member):
  counts = jnp.arange(30)

  def rule(n):
    return member(n, 3, 2)

  found = np.asarray(capacity.of_valid(counts, 29, rule))
  for n in range(1, 30):
    assert found[n].tolist() == np.asarray(rule(n)).tolist(), n
  assert not np.any(found[0])  # nothing to serve


@pytest.mark.parametrize("count", ["valid", "all"])
def test_padding_gives_no_slots_unless_it_is_counted(count):
  logits = jnp.zeros((12, 2)).at[:, 0].set(1.0)  # all tokens to expert 0
  context = Context(valid=jnp.arange(12) % 2 == 0, group_size=4)
  routing = routers.top_k(logits, logits, logits, k=1, context=context)
  member = use(capacity.by_factor, factor=1.0, count=count)
  plan = assign(routing, context, capacity=member)
  assert plan.capacity == 2
  assert plan.rows.tolist() == [[1 if count == "valid" else 2, 0]] * 3
  assert plan.load.tolist() == [[2, 0]] * 3


@pytest.mark.parametrize(
  "member, match",
  [
    (use(capacity.by_factor, factor=0.0), "factor=0.0 must be a positive"),
    (use(capacity.by_factor, factor=-1.0), "factor=-1.0"),
    (use(capacity.by_factor, factor=float("inf")), "capacity=None"),
    (use(capacity.by_factor, factor=1.0, eval_factor=0), "eval_factor=0"),
    (use(capacity.by_factor, factor=1.0, minimum=-1), "minimum=-1"),
    (use(capacity.by_factor, factor=1.0, multiple_of=0), "multiple_of=0"),
    (use(capacity.by_factor, factor=1.0, per_expert=(1.0,)), "one for each of"),
    (use(capacity.by_factor, factor=1.0, per_expert=(1.0, 0.0)), "per_expert=0.0"),
    (use(capacity.by_factor, factor=1.0, count="some"), "count='some'"),
    (use(capacity.fixed, slots=-1), "slots=-1"),
  ],
  ids=repr,
)
def test_impossible_capacities_are_refused(member, match):
  with pytest.raises(ValueError, match=match):
    jmoe.MoEConfig(
      8, 2, capacity=member, dispatch=use(dispatch.buckets), experts=cases.expert()
    )
