"""Upcycling, pruning, back to dense: what each keeps to the bit, and their formulas."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import (
  aggregate,
  balance,
  combine,
  experts,
  gates,
  losses,
  renormalise,
  restrict,
  routers,
  surgery,
)
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.surgery import grow as growing, prune as pruning, upcycle as upcycling
from jmoe.surgery.shells import alone
from jmoe.surgery.to_dense import to_dense
from jmoe.use import use
from tests import oracle
from tests.surgery import cases
from tests.tolerance import assert_close

SAMPLE = cases.sample()
VALID = np.asarray(SAMPLE.segment) > 0


def logits(model):
  return cases.logits(model, SAMPLE)[VALID]


def expert_fn(params, e):
  """Expert e, SwiGLU, as a function of one token."""
  gate, up, down = (params[n][e] for n in ("gate_EDF", "up_EDF", "down_EFD"))
  return oracle.glu(gate, up, down, oracle.silu)


def dense_model(activation=jax.nn.silu):
  block = BlockConfig(Attention(num_heads=2), Dense(6, activation=activation))
  return cases.model(ModelConfig(cases.V, cases.D, (((block,), 2),), remat=False))


PARENT = dense_model()


@pytest.mark.parametrize(
  "fields", [dict(num_experts=3), dict(num_experts=6, k=4, granularity=2)], ids=str
)
def test_upcycled_with_renormalised_weights_begins_as_its_parent(fields):
  made = upcycling.upcycle(PARENT, **fields)
  assert_close(logits(made), logits(PARENT))
  if "granularity" not in fields:
    back = to_dense(made)
    assert back.config == PARENT.config
    chex.assert_trees_all_equal(dict(back.params), dict(PARENT.params))


def test_upcycled_layers_have_what_their_configuration_asks_for():
  given = dict(
    router=use(routers.top_k, k=2),
    experts=use(experts.glu, d_ff=5),
    balance=use(balance.update, rate=0.1),
    losses=(use(losses.load_balance, accumulate=4),),
  )
  config = jmoe.MoEConfig(
    cases.D,
    4,
    combine=use(combine.stack),
    aggregate=use(aggregate.dag, d_message=4),
    **given,  # type: ignore[arg-type]
  )
  made = upcycling.upcycle(PARENT, num_experts=4, config=config)
  assert set(surgery.layers(made)[0].params) == {"gate", "experts", "aggregate"}
  assert_close(logits(made), logits(PARENT))  # messages begin at zero


def test_upcycled_without_is_the_parent_times_the_sum_of_weights():
  made = upcycling.upcycle(
    PARENT, num_experts=3, renormalised=False, blocks_changed=[1]
  )
  first, layer = surgery.blocks(made)[0], surgery.blocks(made)[1].layer
  assert not first.sparse
  x = np.random.default_rng(0).normal(size=(5, cases.D)).astype(np.float32)
  y, _ = jmoe.moe(layer.params, jnp.asarray(x), layer.config)
  probs = oracle.softmax(x @ np.asarray(layer.params["gate"]["kernel_DE"]))
  weight = np.sort(probs, 1)[:, -2:].sum(1, keepdims=True)
  one = expert_fn(layer.params["experts"], 0)
  assert_close(y, weight * np.stack([one(row) for row in x]).astype(np.float32))


def test_partial_reinitialisation_leaves_the_other_hidden_units():
  made = upcycling.upcycle(PARENT, num_experts=3, reinit=0.5)
  layer = surgery.layers(made)[0].params["experts"]
  old = surgery.blocks(PARENT)[0].params["ff.up.kernel"]
  same = np.all(layer["up_EDF"] == old, axis=1)  # bool[E,F]
  np.testing.assert_array_equal(same.sum(1), [3, 3, 3])
  assert len({tuple(row) for row in same}) > 1  # not the same ones in all
  down = surgery.blocks(PARENT)[0].params["ff.down.kernel"]
  np.testing.assert_array_equal(np.all(layer["down_EFD"] == down, axis=2), same)
  array = jnp.asarray(0.5)
  chex.assert_trees_all_equal(
    upcycling.upcycle(PARENT, num_experts=3, reinit=array).params, made.params
  )
  gone = upcycling.upcycle(PARENT, num_experts=3, noise=0.1)
  noisy = surgery.layers(gone)[0].params["experts"]["up_EDF"] - old
  np.testing.assert_allclose(noisy.std() / old.std(), 0.1, rtol=0.25)


def test_noise_and_means_of_bfloat16_are_those_of_float32():
  """NumPy adds bfloat16 in bfloat16: of many numbers a sum stops growing."""
  random = np.random.default_rng(0)
  wide = {n: 0.02 * random.normal(size=(64, 256)) + 0.01 for n in ("up", "gate")}
  wide |= {"down": wide["up"].T}
  given = {n: x.astype(jnp.bfloat16) for n, x in wide.items()}
  own = dict(num_experts=2, k=2, activation=jax.nn.silu)
  noisy = upcycling.copied(given, noise=0.5, **own)
  new = upcycling.copied(given, reinit=1.0, **own).params["experts"]["up_EDF"]
  assert new.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.std(new.astype(np.float32)), 0.02, rtol=0.05)
  np.testing.assert_allclose(np.mean(new.astype(np.float32)), 0.01, rtol=0.05)
  grown = growing.grow(alone(noisy), 2, noise=0.5)
  both = upcycling.expand(alone(noisy), times=2, noise=0.5)
  parent = noisy.params["experts"]["up_EDF"].astype(np.float32)
  for old, made in (
    (wide["up"], parent),
    (parent, surgery.layers(grown)[0].params["experts"]["up_EDF"][2:]),
    (parent, surgery.layers(both)[0].params["experts"]["up_EDF"][1::2]),
  ):
    drawn = np.asarray(made, np.float32) - old
    np.testing.assert_allclose(drawn.std() / old.std(), 0.5, rtol=0.05)
  mean = to_dense(alone(noisy)).params["segments.0.0.ff.up.kernel"][0]
  np.testing.assert_array_equal(mean, parent.mean(0).astype(jnp.bfloat16))


def test_copies_of_experts_with_as_many_choices_change_nothing():
  """Weights as they are: copies share a softmax; renormalised, they share more."""
  ff = cases.layer(
    renormalise=use(renormalise.never), balance=use(balance.update, rate=0.1)
  )
  model = cases.model(cases.config(ff))
  assert np.std(surgery.layers(model)[0].state.bias) > 0.5  # it decides who is chosen
  made = upcycling.expand(model, times=2)
  config = surgery.layers(made)[0].config
  assert (config.num_experts, config.k) == (12, 4)
  assert_close(logits(made), logits(model))
  other = upcycling.expand(model, times=2, k=2, noise=0.1)
  assert surgery.layers(other)[0].config.k == 2
  kept = surgery.layers(other)[0].params["experts"]["up_EDF"][::2]
  np.testing.assert_array_equal(
    kept, surgery.layers(model)[0].params["experts"]["up_EDF"]
  )


MODEL = cases.model(cases.config(cases.BALANCED))


def test_pruning_nothing_is_the_identity():
  made = surgery.cut_model(MODEL, [range(cases.E)] * 2)
  assert made.config == MODEL.config
  chex.assert_trees_all_equal(dict(made.params), dict(MODEL.params))
  chex.assert_trees_all_equal(dict(made.state), dict(MODEL.state))


def test_a_new_domain_begins_what_is_counted_anew():
  config = cases.layer(
    shared=None,
    restrict=(use(restrict.domain, num_domains=3),),
    losses=(use(losses.load_balance, accumulate=4),),
  )
  layer = surgery.layers(cases.model(cases.config(config)))[0]
  state = dataclasses.replace(
    layer.state, counted=np.arange(6, dtype=np.int32), batches=np.int32(2)
  )
  made = growing.add_domain(layer._replace(state=state), 1)
  np.testing.assert_array_equal(made.state.counted, [0] * 8)
  assert made.state.batches == 0
  x = jnp.zeros((5, cases.D))
  context = jmoe.Context(domain_id=jnp.full(5, 3))
  jax.eval_shape(  # it takes the state
    lambda state: jmoe.moe(made.params, x, made.config, state=state, context=context),
    made.state,
  )


def test_scores_are_their_formulas():
  """Nothing but the embedding reaches the first layer: NumPy knows its inputs."""
  ff = cases.layer(shared=None, renormalise=use(renormalise.before_dropping))
  model = cases.model(cases.config(ff))
  silent = ("attention.out.kernel", "ff.down.kernel")
  params = {n: 0 * x if n.endswith(silent) else x for n, x in model.params.items()}
  model = model._replace(params=params)
  layer = surgery.layers(model)[0]

  def inputs(tokens):
    x = params["embed.embedding"][np.asarray(tokens)[VALID]].astype(np.float64)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    return x * params["segments.1.0.ff_norm.scale"][0]

  x = inputs(SAMPLE.inputs)
  probs = oracle.softmax(x @ layer.params["gate"]["kernel_DE"])
  fns = [expert_fn(layer.params["experts"], e) for e in range(cases.E)]
  load, saliency = np.zeros(cases.E), np.zeros(cases.E)
  for token, p in zip(x, probs, strict=True):
    chosen = np.argsort(-p)[: cases.K]
    for e in chosen:
      load[e] += 1
      saliency[e] += p[e] / p[chosen].sum() * np.linalg.norm(fns[e](token))
  (mean_D, _) = growing.inputs(model, [SAMPLE, SAMPLE])
  assert_close(mean_D.astype(np.float32), x.mean(0).astype(np.float32))
  others = [cases.sample(seed=n) for n in (7, 8)]
  new, far = (inputs(other.inputs) for other in others)
  gap = new.mean(0) - (x.mean(0) + far.mean(0)) / 2
  pooled = sum(w * np.cov(a.T, ddof=0) for w, a in ((0.5, new), (0.25, x), (0.25, far)))
  pooled += 0.1 * np.diag(pooled).mean() * np.eye(cases.D)
  expected = np.linalg.solve(pooled, gap)
  nearest = max(x.mean(0) @ expected, far.mean(0) @ expected)
  rise = new.mean(0) @ expected - nearest
  for margin in (abs(rise) / 4, 2 * abs(rise)):  # as far as asked, as far as they are
    old = [[SAMPLE], [others[1]]]
    column_D, bias = growing.apart(model, [others[0]], old, margin=margin)[0]
    share = min(1, 2 * margin / rise) if rise > 0 else 1
    assert_close(np.float32(column_D), np.float32(share * expected))
    assert_close(np.float32(share * nearest + bias), np.float32(-margin))
  some = load > 0
  reap = pruning.by_reap(model, [SAMPLE, SAMPLE])[0]
  assert_close(reap[some].astype(np.float32), saliency[some] / load[some])
  assert not reap[~some].any()
  counted = pruning.by_frequency(model, [SAMPLE, SAMPLE])[0]
  np.testing.assert_array_equal(counted, 2 * load)


def test_layers_that_add_the_skip_connection_themselves_are_walked_too():
  messages = use(aggregate.dag, d_message=3)
  ff = cases.layer(combine=use(combine.stack), aggregate=messages)
  model = cases.model(cases.config(ff))
  module = model.module()
  infos = jax.jit(lambda *each: module(*each)[1])(*SAMPLE)
  counted = pruning.by_frequency(model, [SAMPLE])
  np.testing.assert_array_equal(counted, infos[0].load)


def test_the_best_are_kept_evenly_or_where_they_are():
  scores = [np.array([3.0, 1, 2, 0]), np.array([0.0, 0, 9, 3])]
  assert pruning.choose(scores, keep=2) == [[0, 2], [2, 3]]
  uneven = pruning.choose(scores, keep=2, uniform=False)
  # Means 1.5 and 3: 3/1.5 = 2, 9/3 = 3, 2/1.5 = 1.33, 3/3 = 1.
  assert uneven == [[0, 2], [2, 3]]
  uneven = pruning.choose([np.array([4.0, 3, 3]), np.array([9.0, 0, 0])], keep=2,
                        uniform=False)  # fmt: skip
  assert uneven == [[0, 1, 2], [0]]
  with pytest.raises(ValueError, match="keep=5"):
    pruning.choose(scores, keep=5)


def test_side_by_side_experts_are_what_all_of_them_give():
  ff = cases.layer(
    experts=use(experts.glu, d_ff=3),
    router=use(routers.top_k, k=cases.E, scale=float(cases.E)),
    renormalise=use(renormalise.before_dropping),
  )
  model = cases.model(cases.config(ff))
  even = {n: x * 0 if ".gate.kernel_DE" in n else x for n, x in model.params.items()}
  model = model._replace(params=even)  # so that each expert's weight is one
  made = to_dense(model, how="concatenate")
  ff = surgery.blocks(made)[1].config.ff
  assert isinstance(ff, Dense) and ff.d_ff == 3 * cases.E + 5
  assert_close(logits(made), logits(model))


ONES_LAYER = cases.layer(
  gate=use(gates.keys), renormalise=use(renormalise.ones), losses=()
)
ONES = cases.config(ONES_LAYER)
MLP_SHARED, GELU_SHARED = (
  cases.config(cases.layer(shared=shared))
  for shared in (
    use(experts.mlp, d_ff=5),
    use(experts.glu, d_ff=5, activation=jax.nn.gelu),
  )
)


def test_mistakes_are_named():
  for call, message in (
    (lambda: upcycling.upcycle(PARENT, num_experts=3, granularity=2), "granularity=2"),
    (lambda: upcycling.upcycle(MODEL, num_experts=2, blocks_changed=[1]), "dense"),
    (lambda: upcycling.upcycle(PARENT, num_experts=4, reinit=2), "reinit=2"),
    (lambda: upcycling.upcycle(PARENT, num_experts=4, noise=np.nan), "noise=nan"),
    (lambda: upcycling.upcycle(PARENT, num_experts=2, blocks_changed=[0, 0]), "once"),
    (lambda: upcycling.expand(MODEL, times=2, noise=np.inf), "noise=inf"),
    (lambda: upcycling.expand(cases.model(ONES), times=2), "renormalise=ones"),
    (lambda: upcycling.upcycle(PARENT, num_experts=4, config=ONES_LAYER), "has shared"),
    (
      lambda: upcycling.copied({"up_bias": 0}, num_experts=2, k=1, activation=abs),
      "no biases",
    ),
    (
      lambda: upcycling.copied({"up": 0}, num_experts=2, k=1, activation=abs),
      r"matrices=\['up'\]; give up, down",
    ),
    (lambda: upcycling.expand(MODEL, times=2, noise=np.asarray(-1.0)), "noise=-1.0"),
    (lambda: growing.apart(MODEL, [], [], margin=np.asarray(0.0)), "margin=0.0 must"),
    (lambda: surgery.cut_model(MODEL, [[0, 0], [1]]), "must be distinct"),
    (lambda: surgery.cut_model(MODEL, [[0, 6], [1]]), "in 0..5"),
    (lambda: to_dense(MODEL, how="sum"), "how='sum'"),
    (lambda: upcycling.upcycle(PARENT, num_experts=4, k=1), "renormalised=False"),
    (lambda: to_dense(cases.model(MLP_SHARED)), r"shared=mlp\(d_ff=5\) beside"),
    (lambda: to_dense(cases.model(GELU_SHARED)), "one kind and one activation"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
