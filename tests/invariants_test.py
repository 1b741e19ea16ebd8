"""What holds for every routing, whatever the numbers are."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import hypothesis
import hypothesis.extra.numpy as drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import (
  Context,
  dispatch,
  experts,
  gates,
  layer,
  losses,
  noise,
  routers,
  score,
  use,
)
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import MoEConfig
from jmoe.contexts import flatten
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

D, F, E, K = 8, 6, 4, 2
KEY = jax.random.key(3)
DISPATCHES = {
  "sort": dict(dispatch=use(dispatch.sort)),
  "buckets": dict(
    dispatch=use(dispatch.buckets), capacity=use(capacity.by_factor, factor=1.0)
  ),
  "einsum": dict(
    dispatch=use(dispatch.einsum), capacity=use(capacity.by_factor, factor=1.0)
  ),
}
LOSSES = (
  use(losses.load_balance),
  use(losses.load_balance, over="sequence"),
  use(losses.router_z),
  use(losses.importance),
  use(losses.entropy_global),
)


def identity(params, rows):
  """Experts that give back what they get."""
  del params
  return rows.gathered()


def config(**fields) -> MoEConfig:
  own = dict(
    experts=use(experts.glu, d_ff=F),
    router=use(routers.top_k, k=K),
    renormalise=use(renormalise.before_dropping),
    losses=LOSSES,
  )
  return MoEConfig(D, E, **{**own, **fields})


def some(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(config, seed=1):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) / 2,
    layer.param_shapes(config),
  )


def steered(config, seed=1):
  """Parameters whose gate reads the logits off the first E entries of a token."""
  params = params_of(config, seed)
  return {**params, "gate": {"kernel_DE": jnp.eye(D, E)}}


# -- identity, and what is dropped -----------------------------------------------------

WHOLE = {
  "top_k": dict(router=use(routers.top_k, k=K)),
  "over_chosen": dict(
    score=use(score.sigmoid), renormalise=use(renormalise.over_chosen)
  ),
  "after": dict(renormalise=use(renormalise.after_dropping)),
  "top_2": dict(router=use(routers.top_2)),
  "every": dict(router=use(routers.every_expert), renormalise=use(renormalise.never)),
}
AMPLE = use(capacity.fixed, slots=7)


@pytest.mark.parametrize(
  ("router", "carried"),
  [
    *(("top_k", name) for name in DISPATCHES),
    ("over_chosen", "sort"),
    ("after", "buckets"),
    ("top_2", "einsum"),
    ("every", "sort"),
  ],
)
def test_identity_experts_whose_weights_sum_to_one_give_the_token_back(router, carried):
  fields = {**DISPATCHES[carried], **WHOLE[router], "experts": use(identity)}
  if "capacity" in fields:
    fields["capacity"] = AMPLE
  whole = config(**fields)
  x_TD = some((7, D))
  y_TD, info = layer.moe(params_of(whole), x_TD, whole, context=Context(num_rows=1))
  assert_close(y_TD, x_TD)
  assert float(info.dropped.get("capacity", 0)) == 0


@pytest.mark.parametrize("carried", DISPATCHES)
def test_identity_experts_of_weight_one_give_the_token_back_exactly(carried):
  fields = {**DISPATCHES[carried], "experts": use(identity)}
  if "capacity" in fields:
    fields["capacity"] = AMPLE
  one = config(
    router=use(routers.hashed, vocab_size=5),
    renormalise=use(renormalise.never),
    losses=(),
    **fields,
  )
  x_TD = some((7, D))
  context = Context(token_id=np.arange(7) % 5, table=np.array([3, 0, 2, 0, 1]))
  y_TD, _ = layer.moe(params_of(one), x_TD, one, context=context)
  np.testing.assert_array_equal(y_TD, x_TD)


@pytest.mark.parametrize("carried", DISPATCHES)
def test_dropped_tokens_get_zero_and_no_gradient(carried):
  fields = DISPATCHES[carried]
  if carried == "sort":
    fields = {**fields, "max_rows": 0.5}  # 12 assignments want 2 experts, 6 rows
  else:
    fields = {**fields, "capacity": use(capacity.fixed, slots=2)}
  cut = config(**fields, losses=())
  params = steered(cut)
  x_TD = some((6, D)) / 4
  x_TD[:, :2] += [4.0, 2.0]  # everyone wants expert 0, then expert 1

  def loss_fn(params, x_TD):
    y_TD, info = layer.moe(params, x_TD, cut, with_plan=True)
    return jnp.sum(y_TD * some((6, D), 5)), (y_TD, info)

  grad = jax.jit(jax.grad(loss_fn, (0, 1), has_aux=True))
  (d_params, d_x), (y_TD, info) = grad(params, x_TD)
  kept_TK = np.asarray(info.plan.kept).reshape(6, K)
  dropped_T = ~kept_TK.any(axis=1)
  assert 0 < dropped_T.sum() < 6
  np.testing.assert_array_equal(y_TD[dropped_T], 0)
  np.testing.assert_array_equal(d_x[dropped_T], 0)
  assert np.all(np.any(d_x[~dropped_T] != 0, axis=1))
  assert info.load.tolist() == [6, 6, 0, 0]  # demand is counted before the cut
  share = sum(float(part) for part in info.dropped.values())
  assert share == pytest.approx(1 - kept_TK.mean())
  for leaf in jax.tree.leaves(d_params["experts"]):
    np.testing.assert_array_equal(leaf[2:], 0)  # nobody came to these
    assert np.any(np.asarray(leaf[0]) != 0)


# -- padding ---------------------------------------------------------------------------

# Two rows of five tokens, and the same tokens spread over two rows of eight.
PLACE = np.array([0, 1, 3, 4, 7, 9, 10, 11, 13, 14])
VALID = np.isin(np.arange(16), PLACE)
HASHED = dict(
  router=use(routers.hashed, vocab_size=9), renormalise=use(renormalise.never)
)
NEVER = dict(renormalise=use(renormalise.never))
NO_COUNT = (use(losses.router_z), use(losses.importance))
ROUTERS = {
  "top_k": {},
  "top_2": dict(router=use(routers.top_2, policy="random"), **NEVER),
  "sampling": dict(router=use(routers.top_2, policy="sampling")),
  "noisy": dict(router=use(routers.noisy_top_k, k=2)),
  "hashed": HASHED,
  "every": dict(router=use(routers.every_expert), **NEVER),
  "random": dict(priority=use(priority.random), logit_noise=use(noise.gaussian)),
  "confidence": dict(priority=use(priority.by_confidence), score=use(score.sigmoid)),
  "rows": dict(group_size="row"),
  "groups": dict(group_size=8),
  "choice": dict(router=use(routers.expert_choice), losses=NO_COUNT, **NEVER),
  "soft": dict(
    gate=use(gates.slots, slots_per_expert=2),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    losses=(),
    **NEVER,
  ),
}
PAIRS = [
  ("top_k", "sort"),
  ("top_k", "buckets"),
  ("top_k", "einsum"),
  ("top_2", "buckets"),
  ("noisy", "einsum"),
  ("hashed", "sort"),
  ("every", "buckets"),
  ("random", "buckets"),
  ("rows", "buckets"),
  ("choice", "buckets"),
  ("choice", "einsum"),
  ("soft", "mix"),
]
REST = [
  (router, carried)
  for router in ROUTERS
  for carried in DISPATCHES
  if router not in ("soft", "groups") and (router, carried) != ("choice", "sort")
]


def routed(router, carried) -> MoEConfig:
  fields = {**DISPATCHES.get(carried, {}), **ROUTERS[router]}
  if router == "choice":
    fields["capacity"] = None
  return config(**fields)


def context_of(position, valid=None) -> Context:
  """Two rows; what a token is depends on its position alone."""
  return Context(
    valid=valid,
    position=np.asarray(position, np.int32),
    token_id=np.asarray(position, np.int32) % 9,
    table=np.arange(9, dtype=np.int32) % E,
    num_rows=2,
  )


def check_padding(config):
  """The padded outcome, whatever padding holds, is the outcome without padding."""
  params, x_TD = params_of(config), some((10, D))
  arguments = dict(key=KEY, train=True, with_plan=True)
  expected, alone = layer.moe(
    params, x_TD, config, context=context_of(np.arange(10)), **arguments
  )
  position = np.full(16, 77)
  position[PLACE] = np.arange(10)
  padded = context_of(position, VALID)
  for garbage in (0.0, 1e4, np.nan, np.inf):
    spread_TD = np.full((16, D), garbage, np.float32)
    spread_TD[PLACE] = x_TD
    y_TD, info = layer.moe(params, spread_TD, config, context=padded, **arguments)
    assert_close(y_TD[PLACE], expected)
    np.testing.assert_array_equal(y_TD[~VALID], 0)
    assert sorted(info.losses) == sorted(alone.losses)
    for name, loss in alone.losses.items():
      assert_close(info.losses[name], loss, name)
    np.testing.assert_array_equal(info.load, alone.load)
    for cause, share in alone.dropped.items():
      assert_close(info.dropped[cause], share, cause)
    assert_close(info.entropy, alone.entropy)
    if getattr(info.plan, "routing", None) is not None and config.k is not None:
      kept_TK = np.asarray(info.plan.kept).reshape(16, -1)
      np.testing.assert_array_equal(
        kept_TK[PLACE].reshape(-1), alone.plan.kept, "who finds a slot"
      )
      assert not kept_TK[~VALID].any()
      np.testing.assert_array_equal(info.plan.rows, alone.plan.rows)
  nobody = dataclasses.replace(padded, valid=np.zeros(16, bool))
  y_TD, info = layer.moe(params, spread_TD, config, context=nobody, **arguments)
  np.testing.assert_array_equal(y_TD, 0)
  reported = (info.losses, info.dropped, info.entropy)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reported))
  if config.k is not None:
    assert info.load.tolist() == [0] * E


@pytest.mark.parametrize(("router", "carried"), PAIRS)
def test_padding_changes_nothing_for_valid_tokens(router, carried):
  check_padding(routed(router, carried))


@pytest.mark.full
@pytest.mark.parametrize(("router", "carried"), sorted(set(REST) - set(PAIRS)))
def test_padding_changes_nothing_in_any_combination(router, carried):
  check_padding(routed(router, carried))


@pytest.mark.parametrize("carried", ["sort", "buckets"])
def test_padding_of_nan_reaches_no_gradient(carried):
  cut = routed("top_k", carried)
  params, x_TD = params_of(cut), some((16, D))
  context = context_of(np.arange(16), VALID)

  def loss_fn(params, x_TD):
    y_TD, info = layer.moe(params, x_TD, cut, context=context)
    return jnp.sum(y_TD[PLACE] ** 2) + sum(info.losses.values())

  grad = jax.jit(jax.grad(loss_fn, (0, 1)))
  zero, other = x_TD.copy(), x_TD.copy()
  zero[~VALID], other[~VALID] = 0, np.nan
  expected, found = grad(params, zero), grad(params, other)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_array_equal(found[1][~VALID], 0)


# -- order -----------------------------------------------------------------------------

ORDERS = {
  "dropless": dict(DISPATCHES["sort"]),
  "confidence": dict(DISPATCHES["buckets"], priority=use(priority.by_confidence)),
  "weight": dict(DISPATCHES["buckets"], priority=use(priority.by_weight)),
  "random": dict(DISPATCHES["buckets"], priority=use(priority.random)),
  "choice": dict(
    router=use(routers.expert_choice),
    dispatch=use(dispatch.buckets),
    losses=NO_COUNT,
    **NEVER,
  ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_permuted_tokens_have_the_permuted_outcome(name):
  ordered = config(**{"losses": LOSSES[2:], **ORDERS[name]})
  params, x_TD = params_of(ordered), some((11, D))
  order = np.random.default_rng(4).permutation(11)

  def outcome(x_TD, position):
    context = Context(position=np.asarray(position, np.int32))
    return layer.moe(params, x_TD, ordered, context=context, key=KEY, with_plan=True)

  y_TD, info = outcome(x_TD, np.arange(11))
  permuted, there = outcome(x_TD[order], order)
  assert_close(permuted, y_TD[order])
  np.testing.assert_array_equal(there.load, info.load)
  jax.tree.map(assert_close, dict(there.losses), dict(info.losses))
  if ordered.capacity is not None:
    assert float(info.dropped["capacity"]) > 0


def test_the_rule_that_serves_tokens_in_order_is_not_blind_to_it():
  ordered = config(**DISPATCHES["buckets"], losses=())
  params, x_TD = params_of(ordered), some((11, D))
  y_TD, _ = layer.moe(params, x_TD, ordered)
  backwards, _ = layer.moe(params, x_TD[::-1].copy(), ordered)
  assert np.abs(backwards[::-1] - y_TD).max() > 1e-3


# -- causality -------------------------------------------------------------------------

CUT = 7  # tokens from here on are changed


def changed(x_TD, seed=9):
  other = x_TD.copy()
  other[CUT:] = some((len(x_TD) - CUT, D), seed)
  return other


def earlier(config, params, x_TD, **arguments):
  """Output of the tokens before the cut, and their kept choices."""
  y_TD, info = layer.moe(params, x_TD, config, with_plan=True, **arguments)
  kept = np.asarray(info.plan.kept).reshape(len(x_TD), -1) if config.k else None
  return np.asarray(y_TD[:CUT]), None if kept is None else kept[:CUT]


@pytest.mark.parametrize("router", ["top_k", "noisy", "every", "hashed"])
def test_dropless_token_choice_is_causal(router):
  causal = config(**{**ROUTERS[router], **DISPATCHES["sort"], "losses": ()})
  params, x_TD = params_of(causal), some((12, D))
  arguments = dict(context=context_of(np.arange(12)), key=KEY, train=True)
  before, _ = earlier(causal, params, x_TD, **arguments)
  for seed in range(3):
    after, _ = earlier(causal, params, changed(x_TD, seed), **arguments)
    assert_close(after, before)


def test_no_gradient_of_an_earlier_output_by_a_later_token():
  causal = config(**DISPATCHES["sort"], losses=())
  params = params_of(causal)

  def early(x_TD):
    return jnp.sum(layer.moe(params, x_TD, causal)[0][:CUT] ** 2)

  d_x = jax.jit(jax.grad(early))(some((12, D)))
  np.testing.assert_array_equal(d_x[CUT:], 0)
  assert np.all(np.any(d_x[:CUT] != 0, axis=1))


def limited(k):
  return config(
    **DISPATCHES["buckets"], router=use(routers.top_k, k=k), losses=(), **NEVER
  )


def test_capacity_in_order_is_causal_for_one_choice():
  causal = limited(1)
  params, x_TD = params_of(causal), some((12, D))
  before, kept = earlier(causal, params, x_TD)
  assert not kept.all()
  for seed in range(4):
    after, kept_after = earlier(causal, params, changed(x_TD, seed))
    np.testing.assert_array_equal(kept_after, kept)
    assert_close(after, before)


def test_capacity_in_order_keeps_first_choices_causal_but_not_second_ones():
  causal = limited(2)
  params, x_TD = steered(causal), some((12, D)) / 4
  x_TD[:, :4] += [0.0, 3.0, 2.0, 0.0]  # first expert 1, then expert 2; 6 slots each
  x_TD[:CUT:2, :4] += [0.0, 0.0, 2.0, 0.0]  # every second one the other way round
  late = x_TD.copy()
  late[CUT:, 2] += 9  # the later tokens now want expert 2 first
  _, before = earlier(causal, params, x_TD)
  _, after = earlier(causal, params, late)
  np.testing.assert_array_equal(after[:, 0], before[:, 0])
  assert (before[:, 1] & ~after[:, 1]).any()


@pytest.mark.parametrize("name", ["choice", "confidence", "weight", "bounded"])
def test_expert_choice_and_ranking_by_score_are_not_causal(name):
  fields = dict(DISPATCHES["sort"], max_rows=0.4) if name == "bounded" else ORDERS[name]
  acausal = config(**{**fields, "losses": ()})
  params, x_TD = params_of(acausal), some((12, D))
  before, _ = earlier(acausal, params, x_TD)
  differences = [
    np.abs(earlier(acausal, params, changed(x_TD, seed))[0] - before).max()
    for seed in range(8)
  ]
  assert max(differences) > 1e-3


def test_soft_routing_is_not_causal_even_by_gradient():
  soft = routed("soft", "mix")
  params = params_of(soft)

  def early(x_TD):
    context = Context(num_rows=1)
    return jnp.sum(layer.moe(params, x_TD, soft, context=context)[0][:CUT] ** 2)

  assert np.any(jax.jit(jax.grad(early))(some((12, D)))[CUT:] != 0)


# -- documents -------------------------------------------------------------------------


@hypothesis.given(
  drawn.arrays(np.int32, (3, 7), elements=hypothesis.strategies.integers(0, 3))
)
def test_documents_share_a_segment_only_within_a_run_of_their_row(segment_BS):
  flat = flatten(Context(segment=segment_BS), (3, 7))
  found_BS = np.asarray(flat.segment).reshape(3, 7)
  assert flat.num_rows == 3 and flat.num_segments == 21
  assert found_BS.min() >= 0 and found_BS.max() < flat.num_segments
  for row in range(3):
    assert not set(found_BS[row]) & set(np.delete(found_BS, row, axis=0).reshape(-1))
    same = found_BS[row, 1:] == found_BS[row, :-1]
    np.testing.assert_array_equal(same, segment_BS[row, 1:] == segment_BS[row, :-1])
    assert np.all(np.diff(found_BS[row]) >= 0)


def test_segments_that_are_already_flat_are_left_as_they_are():
  segment_T = np.array([5, 5, 2, 2, 2, 9])
  flat = flatten(Context(segment=segment_T, num_segments=10), (2, 3))
  np.testing.assert_array_equal(flat.segment, segment_T)
  assert flat.num_segments == 10


# -- precision -------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["top_k", "choice"])
def test_bfloat16_activations_are_routed_in_float32(router):
  narrow = routed(router, "buckets")
  params, x_TD = params_of(narrow), jnp.asarray(some((16, D)), jnp.bfloat16)
  arguments = dict(
    context=context_of(np.arange(16)), key=KEY, train=True, with_plan=True
  )
  y_TD, info = layer.moe(params, x_TD, narrow, **arguments)
  wide_TD, wide = layer.moe(params, x_TD.astype(jnp.float32), narrow, **arguments)
  assert y_TD.dtype == jnp.bfloat16 and wide_TD.dtype == jnp.float32
  routing, expected = info.plan.routing, wide.plan.routing
  for array in (routing.logits, routing.probs, routing.weight, info.entropy):
    assert array.dtype == jnp.float32
  assert all(loss.dtype == jnp.float32 for loss in info.losses.values())
  np.testing.assert_array_equal(routing.expert, expected.expert)
  np.testing.assert_array_equal(routing.weight, expected.weight)
  np.testing.assert_array_equal(info.plan.kept, wide.plan.kept)
  jax.tree.map(np.testing.assert_array_equal, info.losses, wide.losses)
  assert_close(y_TD, wide_TD)


# -- replay ----------------------------------------------------------------------------


def test_a_replay_of_its_own_choices_is_the_same_outcome():
  replayed = config(**DISPATCHES["buckets"])
  params, x_TD = params_of(replayed), some((9, D))
  context = Context(num_rows=3)

  def outcome(params, forced):
    def loss_fn(params):
      y_TD, info = layer.moe(
        params, x_TD, replayed, context=context, forced=forced, with_plan=True
      )
      return jnp.sum(y_TD**2) + sum(info.losses.values()), (y_TD, info)

    return jax.jit(jax.grad(loss_fn, has_aux=True))(params)

  free, (y_TD, info) = outcome(params, None)
  ids_TK = info.plan.routing.expert.reshape(9, K)
  forced, (again_TD, there) = outcome(params, ids_TK)
  assert_close(again_TD, y_TD)
  np.testing.assert_array_equal(there.plan.kept, info.plan.kept)
  jax.tree.map(assert_close, forced, free)


def test_a_replay_weighs_and_learns_with_todays_logits():
  replayed = config(**DISPATCHES["sort"], losses=(), experts=use(identity), **NEVER)
  ids_TK = np.array([[3, 1], [0, 2], [2, -1], [1, 0], [3, 2]], np.int32)
  x_TD = some((5, D))

  def outcome(kernel_DE):
    params = {"gate": {"kernel_DE": kernel_DE}}
    y_TD, info = layer.moe(params, x_TD, replayed, forced=ids_TK, with_plan=True)
    return jnp.sum(y_TD * x_TD), (y_TD, info)

  def by_hand(kernel_DE):
    scores_TE = jax.nn.softmax(jnp.dot(x_TD, kernel_DE, precision="highest"))
    chosen_TE = jnp.asarray(np.eye(E + 1, dtype=np.float32)[ids_TK, :E].sum(1))
    weight_T1 = jnp.sum(scores_TE * chosen_TE, axis=1, keepdims=True)
    return jnp.sum(weight_T1 * x_TD * x_TD), weight_T1 * x_TD

  grad = jax.jit(jax.grad(outcome, has_aux=True))
  for seed in (1, 2):
    kernel_DE = jnp.asarray(some((D, E), seed))
    found, (y_TD, info) = grad(kernel_DE)
    expected, by_hand_TD = jax.grad(by_hand, has_aux=True)(kernel_DE)
    assert_close(y_TD, by_hand_TD)
    assert_close(found, expected)
    assert info.load.tolist() == [2, 2, 3, 2]


def test_a_recording_of_all_layers_is_replayed_through_a_scan():
  num_layers, T = 3, 6
  replayed = config(**DISPATCHES["sort"], losses=())
  params = [params_of(replayed, seed) for seed in range(num_layers)]
  params_L = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
  ids_LTK = np.random.default_rng(8).permuted(
    np.tile(np.arange(E, dtype=np.int32), (num_layers, T, 1)), axis=2
  )[:, :, :K]

  @jax.jit
  def scanned(x_TD, ids_LTK):
    def step(x_TD, inputs):
      params, index = inputs
      y_TD, info = layer.moe(
        params, x_TD, replayed, context=Context(layer=index), forced=ids_LTK
      )
      return x_TD + y_TD, info.load

    return jax.lax.scan(step, x_TD, (params_L, jnp.arange(num_layers)))

  x_TD = jnp.asarray(some((T, D)))
  y_TD, load_LE = scanned(x_TD, ids_LTK)
  for own, ids_TK, load_E in zip(params, ids_LTK, load_LE, strict=True):
    step_TD, info = layer.moe(own, x_TD, replayed, forced=ids_TK)
    x_TD = x_TD + step_TD
    np.testing.assert_array_equal(load_E, np.bincount(ids_TK.ravel(), minlength=E))
    np.testing.assert_array_equal(info.load, load_E)
  assert_close(y_TD, x_TD)


def test_tokens_that_experts_chose_are_replayed():
  chosen = routed("choice", "buckets")
  params, x_TD = params_of(chosen), some((16, D))
  context = context_of(np.arange(16))
  y_TD, info = layer.moe(params, x_TD, chosen, context=context, with_plan=True)
  ids_GEC = jnp.where(info.plan.routing.live, info.plan.routing.token, -1)
  again_TD, _ = layer.moe(
    params, x_TD, chosen, context=context, forced=ids_GEC.reshape(1, E, -1)
  )
  assert_close(again_TD, y_TD)


# -- groups ----------------------------------------------------------------------------

GROUPED = {
  "top_k": DISPATCHES["buckets"],
  "einsum": DISPATCHES["einsum"],
  "random": dict(DISPATCHES["buckets"], priority=use(priority.random)),
  "choice": dict(ORDERS["choice"], losses=()),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_separate_calls(name):
  scoped = (use(losses.load_balance, over="group"), use(losses.router_z))
  alone = config(**{"losses": scoped, **GROUPED[name]})
  grouped = dataclasses.replace(alone, group_size=5)
  params, x_TD = params_of(alone), some((15, D))
  position = np.arange(15, dtype=np.int32)

  def outcome(config, part, **context):
    context = Context(position=position[part], **context)
    x_SD = x_TD[part]
    return layer.moe(params, x_SD, config, context=context, key=KEY, train=True)

  y_TD, info = outcome(grouped, slice(0, 15))
  parts = [outcome(alone, slice(i, i + 5)) for i in (0, 5, 10)]
  assert_close(y_TD, jnp.concatenate([y_SD for y_SD, _ in parts]))
  np.testing.assert_array_equal(info.load, sum(part.load for _, part in parts))
  for loss in info.losses:
    assert_close(info.losses[loss], sum(part.losses[loss] for _, part in parts) / 3)
  if "capacity" in info.dropped:
    shares = [part.dropped["capacity"] for _, part in parts]
    assert sum(shares) > 0 or name == "choice"
    assert_close(info.dropped["capacity"], sum(shares) / 3)
  if name == "top_k":  # rows are groups of their length
    rows = dataclasses.replace(alone, group_size="row")
    np.testing.assert_array_equal(outcome(rows, slice(0, 15), num_rows=3)[0], y_TD)


def test_a_layer_without_parameters_in_its_experts_has_none():
  free = config(experts=use(identity), losses=())
  assert set(jmoe.moe_init(KEY, free)) == {"gate"}
