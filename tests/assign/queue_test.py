"""Queues: their order, their groups, and buffers that are too small."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import capacity, priority, routers
from jmoe.assign import assign
from jmoe.kernels import devices
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases, oracle

T, E = 13, 3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def routed(logits, k=1, **context):
  scores = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
  return routers.top_k(scores, scores, scores, k=k, context=Context(**context))


def to_experts(ids) -> np.ndarray:
  """Logits that send token t to expert ids[t]."""
  return 5.0 * np.eye(E)[np.asarray(ids)]


def ranks(routing, context):
  """`by_choice_rank` that says nothing of its values."""
  return priority.by_choice_rank(routing, context)


def confidence(routing, context):
  """`by_confidence` that says nothing of its values."""
  return priority.by_confidence(routing, context)


SKEWED = to_experts([0] * 9 + [1] * 3 + [2])


@pytest.mark.parametrize("bound", [1, 2, 3, 6, 7, 8, 12, 13, 14])
def test_a_bounded_buffer_cuts_the_longest_queues(bound):
  plan = assign(routed(SKEWED), Context(), max_rows=bound)
  cap = oracle.bounded([9, 3, 1], bound)
  assert plan.load.tolist() == [[9, 3, 1]]
  assert plan.rows.tolist() == [[min(n, cap) for n in (9, 3, 1)]]
  assert int(plan.kept.sum(dtype=jnp.int32)) == sum(min(n, cap) for n in (9, 3, 1))
  assert plan.cause == "buffer" and plan.capacity is None


def test_a_bounded_buffer_serves_first_choices_first():
  logits = np.tile([2.0, 1.0, 0.0], (4, 1))
  member = use(priority.by_choice_rank)
  plan = assign(routed(logits, k=2), Context(), priority=member, max_rows=4)
  assert plan.kept.reshape(4, 2).tolist() == [[True, True]] * 2 + [[False, False]] * 2


def test_groups_queue_by_themselves_and_the_last_may_be_short():
  routing = routed(SKEWED, group_size=5)
  plan = assign(routing, Context(group_size=5), capacity=use(capacity.fixed, slots=2))
  assert plan.load.tolist() == [[5, 0, 0], [4, 1, 0], [0, 2, 1]]
  assert plan.slot.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1, 0]
  dropped = np.flatnonzero(~np.asarray(plan.kept)).tolist()
  assert dropped == [2, 3, 4, 7, 8]


def test_without_a_limit_all_tokens_are_one_group():
  plan = assign(routed(SKEWED, group_size=5), Context(group_size=5))
  assert plan.load.tolist() == [[9, 3, 1]] and np.asarray(plan.kept).all()


def test_idle_entries_come_last_in_the_order():
  valid = np.arange(T) % 2 == 0
  plan = assign(routed(SKEWED, valid=jnp.asarray(valid)), Context(valid=valid))
  live = int(valid.sum())
  assert sorted(plan.order[:live].tolist()) == np.flatnonzero(valid).tolist()
  assert sorted(plan.order.tolist()) == list(range(T))
  by_queue = np.asarray(plan.routing.expert)[np.asarray(plan.order[:live])]
  assert by_queue.tolist() == sorted(by_queue.tolist())


def test_a_skipped_choice_may_hold_a_slot_it_does_not_use():
  # Both tokens' second choice is expert 2; the first token skips it.
  scores = jnp.array([[0.7, 0.0, 0.3], [0.0, 0.55, 0.45]])
  for holds, kept in ((True, [1, 0, 1, 0]), (False, [1, 0, 1, 1])):
    routing = routers.top_2(
      scores, scores, scores, train=True, policy="threshold", threshold=0.4,
      skipped_holds_slot=holds,
    )  # fmt: skip
    one = use(capacity.fixed, slots=1)
    plan = assign(
      routing, Context(), capacity=one, priority=use(priority.by_choice_rank)
    )
    assert plan.kept.astype(jnp.int32).tolist() == kept
    assert plan.load.tolist() == [[1, 1, 2 if holds else 1]]


def test_random_priority_keeps_a_uniform_subset():
  routing = routed(to_experts([0] * T))

  @jax.jit
  @jax.vmap
  def kept(key):
    slots, member = use(capacity.fixed, slots=4), use(priority.random)
    return assign(routing, Context(), capacity=slots, priority=member, key=key).kept

  draws = 2000
  share = np.asarray(kept(jax.random.split(KEY, draws))).mean(0)
  bound = 4 * np.sqrt(4 / 13 * (9 / 13) / draws)
  assert np.all(np.abs(share - 4 / 13) < bound)


def test_random_priority_follows_a_token_to_another_place():
  turn = np.random.default_rng(0).permutation(T)
  logits = np.random.default_rng(1).normal(size=(T, E))
  kept = []
  for rows, position in ((logits, np.arange(T)), (logits[turn], turn)):
    context = Context(position=jnp.asarray(position, jnp.int32))
    plan = assign(
      routed(rows, k=2), context, capacity=use(capacity.fixed, slots=3),
      priority=use(priority.random), key=KEY,
    )  # fmt: skip
    kept.append(np.asarray(plan.kept).reshape(T, 2))
  np.testing.assert_array_equal(kept[0][turn], kept[1])


def test_confidence_ranks_tokens_by_their_first_choice_within_a_rank():
  scores = jnp.array([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.45, 0.55, 0.0]])
  routing = routers.top_k(scores, scores, scores, k=2)
  found = priority.by_confidence(routing, Context()).reshape(3, 2)
  first = np.argsort(-np.asarray(found)[:, 0]).tolist()
  second = np.argsort(-np.asarray(found)[:, 1]).tolist()
  assert first == second == [1, 2, 0]
  assert int(found[:, 0].min()) > int(found[:, 1].max())


ROUTED = routed(np.random.default_rng(0).normal(size=(T, E)), k=2, group_size=5)
QUEUES = [(priority.by_choice_rank, ranks), (priority.by_confidence, confidence)]


@pytest.mark.parametrize("device", ["cpu", "hopper"])
@pytest.mark.parametrize(("known", "unknown"), QUEUES)
def test_queues_by_one_key_are_those_by_two(known, unknown, device):
  context = Context(group_size=5)
  values = np.asarray(known(ROUTED, context))
  assert -known.levels(ROUTED) < values.min() and values.max() <= 0
  slots = use(capacity.fixed, slots=2)
  plans = []
  with devices.as_if(device):
    for member in (known, unknown):
      plans.append(assign(ROUTED, context, capacity=slots, priority=use(member)))
  for one, other in zip(*(jax.tree.leaves(plan) for plan in plans), strict=True):
    np.testing.assert_array_equal(one, other)
  begins = np.cumsum(plans[0].load.reshape(-1)) - plans[0].load.reshape(-1)
  np.testing.assert_array_equal(plans[0].first.reshape(-1), begins)


@pytest.mark.parametrize(
  ("member", "tokens", "device", "keys"),
  [
    (priority.by_choice_rank, 9, "hopper", ["uint16"]),
    (priority.by_choice_rank, 9, "cpu", ["int32"]),
    (priority.by_confidence, 40_000, "gpu", ["int32"]),  # 4 queues x 80,000 entries
    (priority.by_confidence, 2**29, "gpu", ["int32", "int32"]),  # more than 2**31
    (priority.by_weight, 9, "hopper", ["int32", "float32"]),
  ],
)
def test_a_sort_has_as_few_keys_and_bits_as_it_can(member, tokens, device, keys):
  """With one key XLA:GPU takes a library's radix sort; fewer bits are fewer passes."""

  def planned(scores):
    routing = routers.top_k(scores, scores, scores, k=2, context=Context())
    slots = use(capacity.fixed, slots=2)
    return assign(routing, Context(), capacity=slots, priority=use(member))

  with devices.as_if(device):
    found = jax.make_jaxpr(planned)(jax.ShapeDtypeStruct((tokens, E), jnp.float32))
  sorts = [e for e in found.eqns if e.primitive.name == "sort"]
  given = [[v.aval.dtype.name for v in e.invars[: e.params["num_keys"]]] for e in sorts]
  assert given == [keys, ["int32"]]  # the second one is the inverse
