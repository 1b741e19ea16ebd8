"""Pools of documents by loops over documents, and where they must not show."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import experts, losses, restrict, routers
from jmoe.contexts import flatten
from jmoe.parallel import Rules, mesh
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases, jaxprs
from tests.tolerance import assert_close

B, S, D, E, K = 4, 16, 8, 8, 2
KEY = jax.random.key(0)
# Documents of every length: one is cut by the row's end, one is a single token.
SEGMENT = np.array([[1] * 6 + [2] * 9 + [3], [1] * 16, [1, 2, 2, 3] * 2 + [4] * 8,
                    [1] * 5 + [2] * 5 + [0] * 6], np.int32)  # fmt: skip
CONTEXT = Context(valid=jnp.asarray(SEGMENT > 0), segment=jnp.asarray(SEGMENT))
POOL = use(restrict.document_pool, least=K)


def scores(seed: int = 0) -> np.ndarray:
  """f32[T,E] probabilities, of which padding has none."""
  drawn = np.random.default_rng(seed).dirichlet(np.full(E, 0.5), B * S)
  return np.where(SEGMENT.reshape(-1, 1) > 0, drawn, np.nan).astype(np.float32)


def runs() -> list[np.ndarray]:
  """The tokens of each document, in order."""
  found = []
  for row in range(B):
    changes = np.flatnonzero(np.diff(SEGMENT[row])) + 1
    found += [row * S + part for part in np.split(np.arange(S), changes)]
  return [part for part in found if SEGMENT.reshape(-1)[part[0]] > 0]


def ranked(select: np.ndarray, mask: np.ndarray | None = None) -> list[list[int]]:
  """Experts of each document, most liked first."""
  order = []
  for part in runs():
    some = select[part].astype(np.float64)
    if mask is not None:
      some = np.where(mask[part], some, 0)
      some /= some.sum(1, keepdims=True)
    order.append(np.argsort(-some.mean(0), kind="stable").tolist())
  return order


@functools.partial(jax.jit, static_argnums=0)
def _pools(pool, select, context, key, mask):
  return pool(select, flatten(context, (B, S)), key=key, train=True, mask=mask)


def pools(
  select: np.ndarray, *, context: Context = CONTEXT, key=KEY, mask=None, **given
):
  """The pool of each document, which all of its tokens have."""
  pool = use(restrict.document_pool, **{"least": K, **given})
  found = _pools(pool, select, context, key, mask)
  chosen = []
  for part in runs():
    one = np.asarray(found)[part]
    assert (one == one[0]).all()
    chosen.append(np.flatnonzero(one[0]).tolist())
  return chosen


def test_a_pool_holds_the_experts_that_the_document_likes_most():
  select = scores()
  expected = [sorted(order[:3]) for order in ranked(select)]
  assert pools(select, least=3, most=3) == expected
  # Small numbers count as large ones do, and so does a sum that is not one.
  assert pools(7 * select, least=3, most=3) == expected


def test_sizes_are_drawn_by_document_layer_and_key():
  select, order = scores(), ranked(scores())

  def sizes(**given):
    found = pools(select, most=6, **given)
    for one, best in zip(found, order, strict=True):
      assert one == sorted(best[: len(one)]) and K <= len(one) <= 6
    return [len(one) for one in found]

  assert len(set(sizes())) > 2
  assert sizes() == sizes() != sizes(key=jax.random.key(1))
  many = [size for seed in range(12) for size in sizes(key=jax.random.key(seed))]
  counts = np.bincount(many, minlength=7)[K:]
  assert counts.min() > 0.4 * counts.mean() and counts.max() < 2 * counts.mean()


def test_documents_packed_together_have_the_pools_that_they_have_alone():
  select = scores()
  part = runs()[1]
  alone = restrict.document_pool(
    jnp.asarray(select[part]),
    Context(segment=jnp.zeros(len(part), jnp.int32)),
    least=3,
    most=3,
    train=True,
  )
  chosen = np.flatnonzero(np.asarray(alone)[0]).tolist()
  assert chosen == pools(select, least=3, most=3)[1]


def test_no_array_is_of_documents_by_tokens():
  rows, seq, experts_ = 4, 64, 4
  T = rows * seq
  context = flatten(Context(segment=jnp.ones((rows, seq), jnp.int32)), (rows, seq))

  def pool(select, key):
    return restrict.document_pool(
      select, context, least=2, max_documents=8, key=key, train=True
    )

  made = jax.make_jaxpr(pool)(jnp.ones((T, experts_)), KEY)
  sizes = [math.prod(array.shape) for array in jaxprs.arrays(made)]
  assert max(sizes) == T * experts_ < rows * 8 * T


def test_later_documents_of_a_row_share_the_pool_of_the_last():
  select = scores()
  kept = [[0, 1, 1], [0], [0, 1, 1, 1, 1, 1, 1], [0, 1]]  # documents of each row
  bounded = pools(select, least=3, most=3, max_documents=2)
  at = 0
  for row in kept:
    parts = runs()[at : at + len(row)]
    for place in set(row):
      tokens = np.concatenate(
        [p for p, n in zip(parts, row, strict=True) if n == place]
      )
      best = np.argsort(-select[tokens].astype(np.float64).mean(0))[:3]
      for n in np.flatnonzero(np.array(row) == place):
        assert bounded[at + n] == sorted(best.tolist())
    at += len(row)
  assert at == len(bounded)
  whole = pools(select, most=6, max_documents=S)
  assert whole == pools(select, most=6)


def test_pools_are_of_what_other_restrictions_allow():
  select = scores()
  allowed = np.zeros((B * S, E), bool)
  allowed[:, [1, 3, 4, 6]] = True
  found = pools(select, least=3, most=3, mask=jnp.asarray(allowed))
  order = ranked(select, allowed)
  assert found == [sorted(best[:3]) for best in order]
  # An expert that a document may use comes before others, however little it is liked.
  select[:, 6] = 0
  found = pools(select, least=4, most=4, mask=jnp.asarray(allowed))
  assert found == [[1, 3, 4, 6]] * len(found)


def config(**fields) -> jmoe.MoEConfig:
  own = dict(
    router=use(routers.top_k, k=K),
    restrict=(POOL,),
    rescore=True,
    experts=use(experts.mlp, d_ff=4),
    losses=(use(losses.load_balance), use(losses.router_z)),
  )
  return jmoe.MoEConfig(D, E, **{**own, **fields})


X = jax.random.normal(jax.random.key(5), (B, S, D))


def run(config, *, layer: int = 0, train: bool = True, context=CONTEXT):
  """Output and Info of a call."""
  context = dataclasses.replace(context, layer=jnp.int32(layer))
  given = dict(context=context, key=KEY, train=train, with_plan=True)
  alone = config.sharding is None
  with cases.by_operation() if alone else cases.quickly():
    params = jax.tree.map(jnp.asarray, cases.params_of(config))
    return jmoe.layer.apply(params, X, config, **given)


def test_a_pool_of_all_experts_is_the_plain_layer_to_the_bit():
  y, info = run(config(restrict=()))
  y_pool, info_pool = run(config(restrict=(use(restrict.document_pool, least=E),)))
  np.testing.assert_array_equal(y, y_pool)
  chex.assert_trees_all_equal(info.losses, info_pool.losses)
  routing, other = info.plan.routing, info_pool.plan.routing
  np.testing.assert_array_equal(routing.expert, other.expert)
  np.testing.assert_array_equal(routing.weight, other.weight)


def test_evaluation_has_no_pool_and_needs_no_documents():
  valid = Context(valid=CONTEXT.valid)
  plain, _ = run(config(restrict=()), train=False)
  found, _ = run(config(), train=False, context=valid)
  np.testing.assert_array_equal(found, plain)
  with pytest.raises(ValueError, match="needs context.segment"):
    run(config(), context=valid)


def test_evaluation_has_pools_of_one_size_if_it_is_asked():
  asked = POOL.replace(least=5, evaluation=3)
  fixed, info = run(config(restrict=(POOL.replace(least=3, most=3),)))
  y, found = run(config(restrict=(asked,)), train=False)
  np.testing.assert_array_equal(y, fixed)
  np.testing.assert_array_equal(found.plan.routing.expert, info.plan.routing.expert)
  # In training it changes nothing.
  trained, _ = run(config(restrict=(asked,)))
  np.testing.assert_array_equal(
    trained, run(config(restrict=(POOL.replace(least=5),)))[0]
  )
  with pytest.raises(ValueError, match="evaluation=3 needs context.segment"):
    run(config(restrict=(asked,)), train=False, context=Context(valid=CONTEXT.valid))
  for size in (K - 1, E + 1):
    with pytest.raises(ValueError, match=f"evaluation={size} must be None"):
      config(restrict=(POOL.replace(evaluation=size),))


def test_a_document_meets_few_experts():
  _, info = run(config(restrict=(use(restrict.document_pool, least=3, most=3),)))
  expert_TK = np.asarray(info.plan.routing.expert).reshape(-1, K)
  for part in runs():
    assert len(set(expert_TK[part].ravel())) <= 3
  assert float(info.dropped["restriction"]) == 0
  # Scored anew: what a token may not use has no weight in any loss.
  probs_TE = np.asarray(info.plan.routing.probs)
  assert ((probs_TE > 0).sum(1)[SEGMENT.reshape(-1) > 0] == 3).all()


def test_layers_draw_apart_unless_they_are_to_share():
  def sizes(pool, layer):
    _, info = run(config(restrict=(pool,)), layer=layer)
    probs = np.asarray(info.plan.routing.probs)
    return [(probs[part[0]] > 0).sum() for part in runs()]

  assert sizes(POOL, 0) != sizes(POOL, 1)
  shared = POOL.replace(same_in_layers=True)
  assert sizes(shared, 0) == sizes(shared, 1)


def test_recomputation_makes_the_same_pools_and_they_have_no_gradient():
  select = jnp.where(jnp.isnan(scores()), 0, scores())

  def total(select, wrap):
    mask = wrap(lambda x: _pools(POOL, x, CONTEXT, KEY, None))(select)
    return jnp.sum(jnp.where(mask, jnp.square(select), 0))

  slopes = [jax.grad(total)(select, wrap) for wrap in (jax.checkpoint, lambda f: f)]
  np.testing.assert_array_equal(*slopes)
  mask = _pools(POOL, select, CONTEXT, KEY, None)
  np.testing.assert_array_equal(slopes[0], jnp.where(mask, 2 * select, 0))


@pytest.mark.parametrize(
  "sizes, flat", [("context=4,data=2", False), ("data=4,context=2", True)]
)
def test_documents_on_several_devices_are_one(sizes, flat):
  context, pool = CONTEXT, POOL.replace(max_documents=8)
  if flat:  # numbers of one's own, over the whole batch
    segment = jnp.asarray(np.asarray(flatten(CONTEXT, (B, S)).segment))
    context, pool = dataclasses.replace(CONTEXT, segment=segment), POOL
  y, info = run(config(restrict=(pool,)), context=context)
  rules = Rules(tokens=("data",), sequence=("context",))
  with jax.set_mesh(mesh.make(sizes)):
    found = run(config(restrict=(pool,), sharding=rules), context=context)
  y_mesh, info_mesh = jax.device_get(found)
  assert_close(y_mesh, jax.device_get(y))
  assert info_mesh.load.tolist() == info.load.tolist()
  jax.tree.map(assert_close, info_mesh.losses, jax.device_get(info.losses))


@pytest.mark.parametrize(
  "given, match",
  [
    (dict(least=1), "fewer than k=2"),
    (dict(least=9), "num_experts=8"),
    (dict(least=4, most=3), "least <= most"),
    (dict(least=2.0), "least=2.0"),
    (dict(least=2, most=9), "most=9"),
    (dict(least=2, max_documents=0), "max_documents=0"),
    (dict(least=2, same_in_layers=1), "same_in_layers=1"),
  ],
)
def test_what_cannot_be_a_pool_is_refused(given, match):
  with pytest.raises(ValueError, match=match):
    config(restrict=(use(restrict.document_pool, **given),))


def test_a_bound_needs_rows():
  flat = dataclasses.replace(CONTEXT, segment=jnp.zeros(B * S, jnp.int32))
  bounded = config(restrict=(POOL.replace(max_documents=2),))
  with pytest.raises(ValueError, match="not shaped like rows"):
    run(bounded, context=flat)
