"""One table per family, one row per member, one contract for all of them.

A public function without a row fails `test_every_member_has_a_row`; a new one earns its
tests by adding one.  What only one member does is tested in its family's folder.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import inspect
import pkgutil
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import (
  aggregate,
  capacity,
  combine,
  dispatch,
  experts,
  gates,
  join,
  losses,
  noise,
  priority,
  renormalise,
  restrict,
  routers,
  score,
)
from jmoe.assign import assign
from jmoe.dispatch.layout import equal, ragged
from jmoe.types import Context, Groups, Home, Plan, Rows
from jmoe.use import Use, use
from tests import oracle
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

T, D, E, K, V = 13, 8, 6, 2, 11
KEY = jax.random.key(0)
FULL = Context(
  valid=jnp.arange(T) % 5 != 4,
  row=jnp.arange(T, dtype=jnp.int32) // 4,
  segment=jnp.arange(T, dtype=jnp.int32) // 3,
  position=jnp.arange(T, dtype=jnp.int32),
  token_id=(jnp.arange(T, dtype=jnp.int32) * 7) % V,
  domain_id=jnp.arange(T, dtype=jnp.int32) % 3,
  task_id=jnp.zeros(T, jnp.int32),
  modality=jnp.arange(T, dtype=jnp.int32) % 2,
  table=jnp.arange(V, dtype=jnp.int32) % E,
  num_rows=4,
)


def _x(dtype=jnp.float32, seed=1):
  return jax.random.normal(jax.random.key(seed), (T, D), dtype)


LOGITS = 2.0 * jax.random.normal(jax.random.key(2), (T, E))
SCORES = jax.nn.softmax(LOGITS)

# -- the tables: name of the public function -> the uses that are tested ---------------

GATES = {
  "linear": [use(gates.linear), use(gates.linear, bias=True)],
  "cosine": [use(gates.cosine, d_project=5)],
  "keys": [use(gates.keys), use(gates.keys, refresh=True, momentum=0.5)],
  "mlp": [use(gates.mlp), use(gates.mlp, residual=True, d_hidden=7)],
  "none": [use(gates.none)],
  "per_modality": [use(gates.per_modality, num_modalities=2)],
  "slots": [use(gates.slots, slots_per_expert=2)],
}
NOISE = {
  "jitter": [use(noise.jitter, eps=0.1)],
  "gaussian": [use(noise.gaussian)],
  "gumbel": [use(noise.gumbel)],
}
SCORE = {n: [use(getattr(score, n))] for n in ("softmax", "sigmoid", "relu")}
SCORE["sqrt_softplus"] = [use(score.sqrt_softplus)]
RESTRICT = {
  "document_pool": [
    use(restrict.document_pool, least=2, most=3),
    use(restrict.document_pool, least=2, most=2, same_in_layers=True),
  ],
  "domain": [
    use(restrict.domain, num_domains=3),
    use(restrict.domain, num_domains=2, shared=2),
  ],
  "expert_groups": [
    use(restrict.expert_groups, num_groups=3, keep=2, best=1),
    use(restrict.expert_groups, num_groups=3, keep=1, best=2),
  ],
  "subset": [use(restrict.subset, experts=(5, 0, 2))],
}
ROUTERS = {
  "top_k": [use(routers.top_k, k=1), use(routers.top_k, k=3, scale=2.5)],
  "noisy_top_k": [use(routers.noisy_top_k, k=2)],
  "top_2": [
    *(use(routers.top_2, policy=p) for p in ("all", "random", "sampling", "none")),
    use(routers.top_2, policy="threshold", threshold=0.3, skipped_holds_slot=True),
  ],
  "expert_choice": [use(routers.expert_choice, capacity_factor=1.5)],
  "hashed": [use(routers.hashed, vocab_size=V)],
  "every_expert": [use(routers.every_expert)],
  "soft": [use(routers.soft)],
}
PRIORITIES = {
  n: [use(getattr(priority, n))]
  for n in ("by_choice_rank", "by_confidence", "by_weight", "random")
}
CAPACITY = {  # rule -> factor; values are those of the table in its docstring
  "ceil": 358, "mesh": 178, "lingvo": 180, "flaxformer": 179, "vmoe": 360,
  "deepspeed": 358, "tutel": 356, "megablocks": 357, "megatron": 358, "fairseq": 286,
}  # fmt: skip
RENORMALISE = {
  n: [use(getattr(renormalise, n))]
  for n in ("never", "before_dropping", "after_dropping", "over_chosen", "ones")
}
DISPATCH = {
  "sort": [use(dispatch.sort), use(dispatch.sort, block=8)],
  "buckets": [use(dispatch.buckets)],
  "einsum": [use(dispatch.einsum)],
  "all_gather": [use(dispatch.all_gather), use(dispatch.all_gather, block=8)],
  "all_to_all": [use(dispatch.all_to_all)],
  "hierarchical": [use(dispatch.hierarchical)],
  "ragged_all_to_all": [use(dispatch.ragged_all_to_all)],
  "deduplicated": [use(dispatch.deduplicated)],
  "mask": [use(dispatch.mask)],
  "mix": [use(dispatch.mix)],
}
EXPERTS = {
  "mlp": [
    use(experts.mlp, d_ff=5),
    use(experts.mlp, d_ff=5, bias=True),
    use(experts.mlp, d_ff=5, bias="hidden"),
  ],
  "glu": [use(experts.glu, d_ff=5), use(experts.glu, d_ff=5, bias=True)],
  "clamped_glu": [use(experts.clamped_glu, d_ff=5)],
  "with_free": [
    use(experts.with_free, base=use(experts.glu, d_ff=5), constant=1, copy=1, zero=1)
  ],
}
COMBINE = {n: [use(getattr(combine, n))] for n in ("weighted_sum", "stack")}
AGGREGATE = {
  "dag": [
    use(aggregate.dag, d_message=4),
    use(aggregate.dag, d_message=3, gated=False, residual="outer"),
  ],
  "per_task": [use(aggregate.per_task, num_tasks=3)],
}
JOIN = {n: [use(getattr(join, n))] for n in ("add", "sigmoid_gate", "blend")}
LOSSES = {  # value when every expert has the same load and probability
  "load_balance": (use(losses.load_balance), 1.0),
  "importance": (use(losses.importance), 0.0),
  "load": (use(losses.load), 0.0),
  "router_z": (use(losses.router_z), float(np.log(E)) ** 2),
  "entropy_local": (use(losses.entropy_local), float(np.log(E))),
  "entropy_global": (use(losses.entropy_global), -float(np.log(E))),
}
FAMILIES: list[tuple[types.ModuleType, dict[str, Any], set[str]]] = [
  (gates, GATES, {"refresh_keys"}),
  (noise, NOISE, set()),
  (score, SCORE, set()),
  (restrict, RESTRICT, set()),
  (routers, ROUTERS, {"hash_table", "token_choice"}),
  (priority, PRIORITIES, set()),
  (capacity, CAPACITY, {"by_factor", "fixed", "of_group", "of_valid", "check_factor",
                        "fairseq_eval", "slots"}),
  (renormalise, RENORMALISE, set()),
  (dispatch, DISPATCH, set()),
  (experts, EXPERTS, set()),
  (combine, COMBINE, set()),
  (aggregate, AGGREGATE, set()),
  (join, JOIN, set()),
  (losses, LOSSES, {"loss_name", "total_loss"}),
]  # fmt: skip


HELPER_MODULES = {
  f"jmoe.dispatch.{name}"
  for name in ("apart carry everywhere exchange layout placed replicas requeue".split())
} | {"jmoe.experts.layout"}


def rows(table):
  """Every use of a table, named for pytest."""
  uses = [u for member in table.values() for u in member]
  return pytest.mark.parametrize("member", uses, ids=repr)


@pytest.mark.parametrize(
  ("package", "table", "helpers"), FAMILIES, ids=[f[0].__name__ for f in FAMILIES]
)
def test_every_member_has_a_row(package, table, helpers):
  public = {
    name
    for name, value in vars(package).items()
    if inspect.isfunction(value)
    and not name.startswith("_")
    and value.__module__.startswith(package.__name__)
  }
  assert public - helpers == set(table)


@pytest.mark.parametrize(
  "package",
  [p for p, _, _ in FAMILIES if hasattr(p, "__path__")],
  ids=lambda p: p.__name__,
)
def test_every_module_of_a_family_exports_a_member(package):
  exported = {f.__module__ for f in vars(package).values() if inspect.isfunction(f)}
  for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    name = found.name.rpartition(".")[2]
    helper = name.startswith("_") or found.name in HELPER_MODULES
    assert helper or found.name in exported, found.name


# -- gates, noise, score, restrict -----------------------------------------------------


def _gate_params(member: Use) -> dict[str, Any]:
  sizes = dict(d_model=D, num_experts=E, dtype=jnp.float32)
  buffers = getattr(member.function, "buffers", None)
  if buffers is not None:
    return buffers(use(experts.glu, d_ff=5).init(KEY, **sizes))
  return member.init(KEY, **sizes)


@rows(GATES)
def test_gates_give_float32_logits_and_finite_gradients(member):
  params, dense = _gate_params(member), getattr(member.function, "dense", False)
  x_TD, context = _x(jnp.bfloat16), FULL
  if dense:  # rows of equal length
    x_TD, context = x_TD[:12], Context(num_rows=4)

  @jax.jit
  def logits(params, x):
    previous = None if dense else LOGITS
    return member(params, x, context, previous_logits=previous, num_experts=E)

  found = logits(params, x_TD)
  chex.assert_shape(found, (4, 3, E, 2) if dense else (T, E))
  chex.assert_type(found, jnp.float32)
  total = lambda params, x: jnp.sum(jnp.square(logits(params, x)))  # noqa: E731
  chex.assert_tree_all_finite(jax.grad(total, (0, 1))(params, jnp.zeros_like(x_TD)))
  chex.assert_tree_all_finite(jax.grad(total, (0, 1))(params, x_TD))


@rows(NOISE)
def test_noise_belongs_to_a_token_wherever_it_is(member):
  array = jnp.ones((T, E))
  turned = jnp.roll(jnp.arange(T, dtype=jnp.int32), 3)
  here = member(array, context=Context(), key=KEY)
  there = member(array, context=Context(position=turned), key=KEY)
  np.testing.assert_array_equal(here[turned], there)
  assert float(jnp.abs(here - member(array, context=Context(), key=KEY)).max()) == 0
  assert float(jnp.abs(here - array).max()) > 0
  other = member(array, context=Context(), key=jax.random.key(1))
  assert float(jnp.abs(here - other).max()) > 0


@rows(NOISE)
def test_noise_is_drawn_in_training_alone_and_needs_a_key(member):
  field = {"jitter": "input_noise", "gumbel": "select_noise"}.get(
    member.name, "logit_noise"
  )
  config = dataclasses.replace(_layer(), **{field: member})
  params = jmoe.moe_init(KEY, config)
  plain, _ = jmoe.moe(params, _x(), _layer())
  quiet, _ = jmoe.moe(params, _x(), config, key=KEY)
  np.testing.assert_array_equal(plain, quiet)
  with pytest.raises(ValueError, match="key"):
    jmoe.moe(params, _x(), config, train=True)


def _layer(**fields) -> jmoe.MoEConfig:
  return jmoe.MoEConfig(D, E, experts=use(experts.mlp, d_ff=5), losses=(), **fields)


@rows(SCORE)
def test_scores_are_finite_not_negative_and_follow_the_oracle(member):
  wide = jnp.array([[-1e4, -200.0, -1e-30, 0.0, 3.0, 1e4]])
  for logits in (LOGITS, wide):
    found, pull = jax.vjp(jax.jit(member), logits)
    assert_close(found, oracle.SCORES[member.name](np.asarray(logits)), "scores")
    assert bool((found >= 0).all())
    chex.assert_tree_all_finite(pull(jnp.ones_like(found)))


@rows(RESTRICT)
def test_restrictions_leave_k_experts_to_every_token(member):
  mask = jax.jit(lambda s: member(s, FULL, key=KEY, train=True))(SCORES)
  chex.assert_shape(mask, (T, E))
  chex.assert_type(mask, jnp.bool_)
  assert bool((mask.sum(1, dtype=jnp.int32) >= K).all())
  assert not bool(mask.all())
  config = _layer(restrict=(member,))  # the same promise, made when configured
  assert config.k == K


# -- routers ---------------------------------------------------------------------------

TOKEN_CHOICE = {n: u for n, u in ROUTERS.items() if n not in ("soft", "expert_choice")}


def _route(
  member: Use, logits=LOGITS, context=FULL, *, mask=None, forced=None, key=KEY
):
  scores = jax.nn.softmax(logits)
  return member(
    logits,
    scores,
    scores,
    mask=mask,
    context=context,
    key=key,
    train=True,
    forced=forced,
  )


@rows({n: u for n, u in ROUTERS.items() if n != "soft"})
def test_routers_stay_within_mask_and_validity(member):
  mask = restrict.domain(SCORES, FULL, num_domains=2, shared=2)
  routing = jax.jit(lambda m: _route(member, mask=m))(mask)
  live, token = np.asarray(routing.live), np.asarray(routing.token)
  expert = np.asarray(routing.expert)
  chex.assert_equal_shape([routing.token, routing.expert, routing.weight, routing.live])
  chex.assert_type(routing.weight, jnp.float32)
  assert live.any()
  assert np.asarray(mask)[token[live], expert[live]].all()
  assert np.asarray(FULL.valid)[token[live]].all()
  assert not (live & ~np.asarray(routing.queues)).any()
  assert ((expert >= 0) & (expert < E)).all() and ((token >= 0) & (token < T)).all()
  pairs = list(zip(token[live], expert[live], strict=True))
  assert len(set(pairs)) == len(pairs)


@rows({n: u for n, u in ROUTERS.items() if n != "soft"})
def test_routers_commute_with_a_permutation_of_tokens(member):
  turn = np.random.default_rng(0).permutation(T)
  context = jax.tree.map(lambda a: a[turn] if a.shape == (T,) else a, FULL)

  def matrix(logits, context):
    r = _route(member, logits, context)
    dense = np.zeros((T, E))
    live = np.asarray(r.live)
    dense[np.asarray(r.token)[live], np.asarray(r.expert)[live]] = r.weight[live]
    return dense

  assert_close(matrix(LOGITS[turn], context), matrix(LOGITS, FULL)[turn], "permuted")


@rows(ROUTERS)
def test_routers_declare_their_number_of_choices(member):
  k = member.function.choices(E, **member.kwargs)
  if member.name in ("soft", "expert_choice"):
    assert k is None and member.function.causal is False
    return
  routing = _route(member)
  assert routing.k == k and routing.expert.shape == (T * k,)
  np.testing.assert_array_equal(routing.token, np.repeat(np.arange(T), k))


@rows(TOKEN_CHOICE)
def test_recorded_choices_are_replayed_with_the_gradient_of_today(member):
  k = member.function.choices(E, **member.kwargs)
  recorded = (
    jnp.asarray(
      np.random.default_rng(1).permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :k],
      jnp.int32,
    )
    .at[0, k - 1]
    .set(-1)
  )

  def weights(logits):
    routing = _route(member, logits, forced=recorded)
    return jnp.where(routing.live, routing.weight, 0), routing

  weight, pull, routing = jax.vjp(weights, LOGITS, has_aux=True)
  live = np.asarray(routing.live).reshape(T, k)
  used = np.asarray(recorded) >= 0
  np.testing.assert_array_equal(live, used & np.asarray(FULL.valid)[:, None])
  ids = np.asarray(routing.expert).reshape(T, k)
  np.testing.assert_array_equal(ids[used], np.asarray(recorded)[used])
  if member.name == "hashed":
    return  # weights are one
  scores = np.asarray(routing.probs)
  expected = np.take_along_axis(scores, np.maximum(recorded, 0), 1) * live
  assert_close(weight, (expected * routing.scale).reshape(-1).astype(np.float32))
  (gradient,) = pull(jnp.ones_like(weight))
  if k < E:  # over all experts a softmax sums to one
    assert float(jnp.abs(gradient).max()) > 1e-3


# -- assignment ------------------------------------------------------------------------


def _entries(routing):
  return [
    oracle.Entry(int(t), int(e), float(w), bool(a), bool(q))
    for t, e, w, a, q in zip(
      *(
        np.asarray(getattr(routing, n))
        for n in ("token", "expert", "weight", "live", "queues")
      ),
      strict=True,
    )
  ]


@rows(PRIORITIES)
@pytest.mark.parametrize("group_size", [None, 5])
def test_queues_are_the_oracles(member, group_size):
  context = dataclasses.replace(FULL, group_size=group_size)
  routing = _route(use(routers.top_k, k=3), context=context)
  slots = use(capacity.by_factor, factor=0.5)
  plan = jax.jit(
    lambda r: assign(r, context, capacity=slots, priority=member, key=KEY)
  )(routing)
  entries = _entries(routing)
  if member.name == "random":
    order = [float(p) for p in member(routing, context, key=KEY)]
  else:
    order = getattr(oracle, member.name)(entries)
  slot, kept, load = oracle.assign(
    entries, E, T, group_size=group_size, priority=order,
    valid=np.asarray(FULL.valid),
    capacity=lambda n, e: oracle.CAPACITY_RULES["ceil"](n, E, 3, 0.5),
  )  # fmt: skip
  queued = np.asarray(routing.queues)
  np.testing.assert_array_equal(np.asarray(plan.slot)[queued], slot[queued])
  np.testing.assert_array_equal(plan.kept, kept)
  np.testing.assert_array_equal(plan.load, load)
  assert not np.asarray(plan.kept).all() and np.asarray(plan.kept).any()


@pytest.mark.parametrize("name", CAPACITY)
def test_capacity_rules_give_the_published_value(name):
  rule = getattr(capacity, name)
  assert int(rule(1000, 7, 2, 1.25)) == CAPACITY[name]
  counts = np.arange(0, 60)
  together = rule(counts, 7, 2, 1.1)
  np.testing.assert_array_equal(
    together, [int(rule(int(n), 7, 2, 1.1)) for n in counts]
  )
  assert (np.diff(together) >= 0).all()


@rows(RENORMALISE)
def test_renormalised_weights_sum_to_the_scale(member):
  routing = _route(use(routers.top_k, k=3, scale=2.5))
  slots = use(capacity.by_factor, factor=0.5)
  plan = assign(routing, FULL, capacity=slots, priority=use(priority.by_choice_rank))
  after = member(plan)
  kept = np.asarray(plan.kept)
  expected = oracle.renormalise(
    _entries(routing), kept, member.name, scale=2.5, logits=np.asarray(LOGITS)
  )
  if member.name == "never":
    expected = np.asarray(routing.weight)
  assert_close(
    np.where(kept, after.routing.weight, 0),
    np.where(kept, expected, 0).astype(np.float32),
  )
  counted = kept if member.name == "after_dropping" else np.asarray(routing.live)
  total = np.where(counted, after.routing.weight, 0).reshape(T, 3).sum(1)
  if member.name not in ("never", "ones"):
    some = counted.reshape(T, 3).any(1)
    assert_close(total[some], np.full(some.sum(), 2.5, np.float32))
    assert (total[~some] == 0).all()


# -- transport -------------------------------------------------------------------------


def _plan(limited: bool, k: int = 2, group_size=None) -> tuple[Plan, Context]:
  context = dataclasses.replace(FULL, group_size=group_size)
  routing = _route(use(routers.top_k, k=k), context=context)
  slots = use(capacity.by_factor, factor=0.6) if limited else None
  return assign(
    routing, context, capacity=slots, priority=use(priority.by_choice_rank)
  ), context


# The two others take no rows to experts; `mask` has its own test in tests/dispatch.
SPARSE = {n: u for n, u in DISPATCH.items() if n not in ("mask", "mix")}


@rows(SPARSE)
@pytest.mark.parametrize("group_size", [None, 5])
def test_identity_experts_bring_every_kept_token_home(member, group_size):
  limited = member.function.dropless is False
  plan, _ = _plan(limited, group_size=group_size)
  x_TD = _x()

  @jax.jit
  def carried(x):
    return member(x, plan, lambda rows: rows.gathered(), combine.stack(plan))

  y_TKD, pull = jax.vjp(carried, x_TD)
  chex.assert_shape(y_TKD, (T, 2, D))
  kept_TK1 = np.asarray(plan.kept).reshape(T, 2, 1)
  assert kept_TK1.any() and not kept_TK1.all()
  np.testing.assert_array_equal(y_TKD, np.where(kept_TK1, x_TD[:, None], 0))
  (back_TD,) = pull(jnp.ones_like(y_TKD))
  assert_close(back_TD, np.broadcast_to(kept_TK1.sum(1), (T, D)).astype(np.float32))


@rows(SPARSE)
def test_transport_is_weighted_and_differentiated_like_the_oracle(member):
  plan, _ = _plan(member.function.dropless is False)
  factor_E = jnp.arange(1.0, E + 1)  # expert e multiplies by e + 1

  def experts_(rows):
    x = rows.gathered()
    from jmoe.kernels.grouped_matmul.reference import expert_of_rows

    return x * factor_E[expert_of_rows(rows.groups, x.shape[0])][:, None]

  def y(x, weight):
    way = Home(jnp.where(plan.kept, weight, 0))
    return member(x, plan, experts_, way)

  expert_fns = [lambda x, e=e: x * (e + 1) for e in range(E)]
  weight = np.asarray(plan.routing.weight)
  expected = oracle.forward(
    np.asarray(_x(), np.float64), _entries(plan.routing), np.asarray(plan.kept), weight,
    expert_fns,
  )  # fmt: skip
  found, pull = jax.vjp(jax.jit(y), _x(), plan.routing.weight)
  assert_close(found, expected.astype(np.float32))
  d_x, d_weight = pull(jnp.ones_like(found))
  kept = np.asarray(plan.kept)
  share = np.where(kept, weight * (np.asarray(plan.routing.expert) + 1), 0)
  assert_close(
    d_x, np.broadcast_to(share.reshape(T, 2).sum(1)[:, None], (T, D)).astype(np.float32)
  )
  rows_N = np.asarray(_x()).sum(1)[np.asarray(plan.routing.token)]
  assert_close(
    d_weight,
    np.where(kept, rows_N * (np.asarray(plan.routing.expert) + 1), 0).astype(
      np.float32
    ),
  )


@rows({"mix": DISPATCH["mix"], "soft": ROUTERS["soft"]})
def test_soft_routing_is_the_oracles(member):
  del member  # the two only go together
  G, S, C = 4, 3, 2
  logits = jax.random.normal(KEY, (G, S, E, C))
  valid = np.arange(G * S) % 5 != 4
  mixing = routers.soft(logits, context=Context(valid=jnp.asarray(valid)))
  sent, back = oracle.soft(np.asarray(logits), valid.reshape(G, S))
  assert_close(mixing.dispatch, sent.astype(np.float32))
  assert_close(mixing.combine, back.astype(np.float32))
  x_TD = _x()[: G * S]
  y_TD = dispatch.mix(x_TD, mixing, lambda rows: 2 * rows.gathered())
  expected = oracle.soft_forward(
    np.asarray(x_TD, np.float64).reshape(G, S, D), sent, back, [lambda x: 2 * x] * E
  )
  assert_close(y_TD, expected.reshape(G * S, D).astype(np.float32))


@rows(EXPERTS)
def test_experts_are_the_same_in_ragged_and_equal_groups(member):
  params = member.init(KEY, d_model=D, num_experts=E, dtype=jnp.float32)
  noisy = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)
    .reshape(p.shape)), params)  # fmt: skip
  plan, _ = _plan(limited=False)
  roomy = dataclasses.replace(plan, capacity=int(plan.load.max()))

  def y(params, x, layout):
    rows = Rows(x, layout.groups, layout)
    kept = jnp.where(plan.kept, plan.routing.weight, 0)
    from jmoe.dispatch import carry

    return carry.home(member(params, rows), Home(kept), layout)

  results = []
  for layout in (ragged(plan), equal(roomy)):
    value, pull = jax.vjp(jax.jit(lambda p, x, a=layout: y(p, x, a)), noisy, _x())
    results.append((value, pull(jnp.cos(value))))
  jax.tree.map(assert_close, *results)
  assert float(jnp.abs(results[0][0]).max()) > 0


@rows(COMBINE)
def test_ways_home_give_dropped_assignments_nothing(member):
  plan, _ = _plan(limited=True)
  way = member(plan)
  chex.assert_shape(way.weight, plan.kept.shape)
  assert (np.asarray(way.weight)[~np.asarray(plan.kept)] == 0).all()
  assert way.sums is (member.name == "weighted_sum")
  if way.sums:
    kept = np.asarray(plan.kept)
    np.testing.assert_array_equal(way.weight[kept], plan.routing.weight[kept])


@rows(AGGREGATE)
def test_aggregations_of_equal_outputs_give_that_output(member):
  plan, _ = _plan(limited=False, k=E)
  params = member.init(KEY, d_model=D, num_experts=E, dtype=jnp.float32)
  same_TKD = jnp.broadcast_to(_x()[:, None], (T, E, D))
  # Weights of all experts sum to one; what is not to be added is zero.
  nothing = jnp.zeros((T, D))
  x = _x() if member.name == "per_task" else nothing
  y = jax.jit(member)(params, same_TKD, plan, x, nothing)
  valid_T1 = FULL.valid[:, None]
  expected = _x() if member.name == "per_task" else jnp.where(valid_T1, _x(), 0)
  assert_close(y, jnp.broadcast_to(
    expected[:, None] if y.ndim == 3 else expected, y.shape))  # fmt: skip
  total = lambda p: jnp.sum(jnp.sin(member(p, same_TKD, plan, _x(), _x())))  # noqa: E731
  grads = jax.jit(jax.grad(total))(params)
  chex.assert_tree_all_finite(grads)


@rows(JOIN)
def test_joins_take_both_outputs(member):
  params = member.init(KEY, d_model=D, num_experts=E, dtype=jnp.float32)
  x, y, shared = _x(), _x(seed=3), _x(seed=4)
  found = member(params, y, shared, x)
  chex.assert_equal_shape([found, y])
  x64 = np.asarray(x, np.float64)
  if member.name == "add":
    expected = y + shared
  elif member.name == "sigmoid_gate":
    gate = oracle.sigmoid(x64 @ np.asarray(params["gate_D"]))[:, None]
    expected = y + gate * shared
  else:
    w = oracle.softmax(x64 @ np.asarray(params["kernel_D2"]))
    expected = w[:, :1] * y + w[:, 1:] * shared
  assert_close(found, np.asarray(expected, np.float32))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_their_stated_value_at_perfect_balance(name):
  loss, value = LOSSES[name]
  even = jnp.zeros((T, E))
  ids = (jnp.arange(T * 2, dtype=jnp.int32) % E).reshape(T, 2)
  cut = T - T % 3  # as many assignments for every expert
  context = Context(valid=jnp.arange(T) < cut)
  routing = routers.token_choice(
    ids, logits=even, scores=jax.nn.softmax(even), context=context
  )
  plan = assign(routing, context)
  assert len(set(np.asarray(plan.load[0]).tolist())) == 1
  assert_close(loss(plan, context), jnp.float32(value))
  chex.assert_shape(loss(plan, context), ())
  nothing = Context(valid=jnp.zeros(T, bool))
  empty = assign(
    routers.token_choice(ids, logits=even, scores=SCORES, context=nothing), nothing
  )
  chex.assert_tree_all_finite(loss(empty, nothing))


def test_groups_of_a_layout_do_not_overlap():
  plan, _ = _plan(limited=False)
  groups: Groups = ragged(plan).groups
  end = (
    np.asarray(groups.start)
    + -(-np.asarray(groups.rows) // groups.block) * groups.block
  )
  assert (end[:-1] <= np.asarray(groups.start)[1:]).all()
  assert (np.asarray(groups.start) % groups.block == 0).all()
