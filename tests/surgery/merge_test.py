"""Models merged, grown, joined under a gate: what comes back to the bit."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jmoe import gates, losses, renormalise, restrict, surgery
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.parallel import mesh as meshes
from jmoe.surgery import flex, merge, upcycle
from jmoe.surgery.grow import freeze, grow, inputs
from jmoe.use import use
from tests.surgery import cases
from tests.tolerance import assert_close

SAMPLE = cases.sample()
VALID = np.asarray(SAMPLE.segment) > 0
COUNTS = ("counted", "batches")
CONFIG = cases.config(cases.layer(renormalise=use(renormalise.over_chosen)), repeat=1)
ONE, TWO = (
  surgery.Model(CONFIG, {n: x + seed * np.cos(np.arange(x.size, dtype=x.dtype)
    ).reshape(x.shape) for n, x in cases.model(CONFIG, seed).params.items()})
  for seed in (0, 1)
)  # fmt: skip
PLAIN = cases.model(cases.config(repeat=1))
DENSE = cases.model(
  ModelConfig(
    cases.V,
    cases.D,
    (((BlockConfig(Attention(num_heads=2), Dense(6)),), 2),),
    remat=False,
  )
)


def logits(model):
  return cases.logits(model, SAMPLE)[VALID]


def equal(one, other):
  assert one.config == other.config
  chex.assert_trees_all_equal(dict(one.params), dict(other.params))
  chex.assert_trees_all_equal(dict(one.state), dict(other.state))


def test_an_average_is_one_and_of_equals_theirs():
  equal(merge.average([ONE, ONE, ONE]), ONE)
  made = merge.average([ONE, TWO])
  for name, x in made.params.items():
    assert_close(x, (ONE.params[name] + TWO.params[name]) / 2, name)


def test_what_a_gate_has_for_all_experts_is_averaged():
  layer = cases.layer(gate=use(gates.mlp, d_hidden=3))
  pair = [cases.model(cases.config(layer, repeat=1), seed) for seed in (0, 1)]
  one, two, made = (surgery.layers(m)[0].params["gate"]
                    for m in (*pair, merge.concatenate(pair)))  # fmt: skip
  assert_close(made["hidden_DH"], (one["hidden_DH"] + two["hidden_DH"]) / 2)
  chex.assert_trees_all_equal(
    made["out_HE"], np.concatenate([one["out_HE"], two["out_HE"]], axis=1)
  )


def test_merged_then_cut_gives_the_parent_back_to_the_bit():
  made = merge.concatenate([ONE, TWO], rest="first")
  assert surgery.layers(made)[0].config.num_experts == 2 * cases.E
  ((first, second),) = merge.offsets([ONE, TWO])
  equal(surgery.cut_model(made, [first]), ONE)
  theirs = surgery.layers(surgery.cut_model(made, [second]))[0].params
  for part in ("gate", "experts"):
    chex.assert_trees_all_equal(theirs[part], surgery.layers(TWO)[0].params[part])
  shared = surgery.layers(merge.concatenate([ONE, TWO]))[0].params["shared"]
  mean = jax.tree.map(
    lambda a, b: (a + b) / 2,
    *(surgery.layers(m)[0].params["shared"] for m in (ONE, TWO)),
  )
  jax.tree.map(assert_close, shared, mean)


def test_what_is_counted_within_an_update_is_counted_anew():
  config = cases.config(cases.layer(losses=(use(losses.load_balance, accumulate=4),)))
  models = []
  for seed in (1, 2):
    model = cases.model(config, seed)
    assert set(model.state) == {f"segments.1.0.moe.state.{n}" for n in COUNTS}
    state = {n: np.full(x.shape, seed, np.int32) for n, x in model.state.items()}
    models.append(model._replace(state=state))
  for made in (merge.average(models), merge.concatenate(models)):
    assert set(made.state) == set(models[0].state)
    assert not any(x.any() for x in made.state.values())


def test_dense_models_mixed_are_their_experts_and_the_mean_of_the_rest():
  other = DENSE._replace(params={n: 1.5 * x for n, x in DENSE.params.items()})
  made = merge.mix([DENSE, other, DENSE], k=2)
  layer = surgery.layers(made)[1]
  assert layer.config.num_experts == 3 and layer.config.k == 2
  for e, model in enumerate((DENSE, other, DENSE)):
    up = surgery.blocks(model)[1].params["ff.up.kernel"]
    np.testing.assert_array_equal(layer.params["experts"]["up_EDF"][e], up)
  name = "segments.0.0.attention.query.kernel"
  assert_close(made.params[name], DENSE.params[name] * np.float32(3.5 / 3))
  assert np.std(layer.params["gate"]["kernel_DE"]) < 0.05
  assert_close(logits(merge.mix([DENSE, DENSE])), logits(DENSE))


def part(seed):
  """A part as training under `flex.FREEZE` leaves it: expert 1 and its column moved."""
  random = np.random.default_rng(seed)
  own = cases.sample(seed=seed + 1)
  made = flex.begin(DENSE, [SAMPLE], [own])

  def trained(_, layer):
    stacks = {n: np.array(x) for n, x in layer.params["experts"].items()}
    for x in stacks.values():
      x[1] += 0.3 * random.normal(size=x[1].shape)
    return layer._replace(params={**layer.params, "experts": stacks})

  return surgery.on_layers(made, trained)


def test_an_expert_trained_apart_leaves_as_if_it_never_was():
  parts = [part(seed) for seed in range(3)]
  assert len(parts[0].params["segments.0.0.moe.gate.kernel_DE"].shape) == 3
  two, three = flex.join(parts[:2]), flex.join(parts)
  back = flex.without(three, 3)
  equal(back, two)
  before = logits(two)
  np.testing.assert_array_equal(logits(back), before)
  assert np.abs(logits(three) - before).max() > 1e-3
  # What is left without any part is the public model.
  alone = flex.without(flex.without(two, 2), 1)
  assert_close(logits(alone), logits(DENSE))
  # Of length one, and the public one's the same in all.
  gate = surgery.layers(three)[0].params["gate"]["kernel_DE"]
  np.testing.assert_allclose(np.linalg.norm(gate, axis=0), 1, rtol=1e-6)


def test_parts_of_another_public_model_are_refused():
  name = "embed.embedding"
  moved = part(1)
  moved = moved._replace(params={**moved.params, name: 2 * moved.params[name]})
  with pytest.raises(ValueError, match=f"part 1 has another.*{name}"):
    flex.join([part(0), moved])


def test_new_experts_that_no_token_takes_change_nothing():
  before = logits(ONE)
  silent = grow(ONE, 2, bias=-1e9)
  layer = surgery.layers(silent)[0]
  assert layer.config.num_experts == cases.E + 2
  assert_close(logits(silent), before)
  old = [range(cases.E)]
  bare = surgery.layers(surgery.cut_model(silent, old))[0]
  chex.assert_trees_all_equal(
    bare.params["experts"], surgery.layers(ONE)[0].params["experts"]
  )
  assert freeze(ONE) == (
    "embedding", "matrix", "norm", "shared", "experts:0,1,2,3,4,5",
  )  # fmt: skip


def test_pools_of_documents_go_with_more_experts():
  pool = use(restrict.document_pool, least=2)
  for rule in (pool, use(restrict.document_pool, least=3, most=3)):
    config = cases.config(cases.layer(restrict=(rule,), rescore=True), repeat=1)
    one = cases.model(config)
    wide = surgery.layers(upcycle.expand(one, times=3))[0].config
    assert wide.restrict == (
      rule.replace(**{n: 3 * v for n, v in rule.kwargs.items()}),
    )
    both = merge.concatenate([one, one], rest="first")
    assert surgery.layers(both)[0].config.restrict == (rule,)
    equal(surgery.cut_model(both, [range(cases.E)]), one)
    grown = surgery.layers(grow(one, 2))[0].config  # fewer than a pool's
    assert (grown.restrict, grown.num_experts) == ((rule,), cases.E + 2)
  # A cut's pools are bounded by its experts; those of both are as in the whole.
  rule = use(restrict.document_pool, least=2, most=4)
  whole = cases.model(cases.config(cases.layer(restrict=(rule,)), repeat=1))
  cut = surgery.cut_model(whole, [[0, 2, 5]])
  for pair in ([cut, whole], [whole, cut]):
    both = merge.concatenate(pair, rest="first")
    assert surgery.layers(both)[0].config.restrict == (rule,)
    for model, (own,) in zip(pair, zip(*merge.offsets(pair)), strict=True):
      assert surgery.cut_model(both, [own]).config == model.config
  subset = use(restrict.subset, experts=(0, 1))
  numbered = cases.model(cases.config(cases.layer(restrict=(subset,)), repeat=1))
  with pytest.raises(ValueError, match="numbers the experts"):
    grow(numbered, 1)


def test_a_balance_bias_does_not_choose_new_experts():
  one = cases.model(cases.config(cases.BALANCED, repeat=1))
  old = surgery.layers(one)[0].state.bias
  new = surgery.layers(grow(one, 2, bias=-1e9))[0].state.bias
  np.testing.assert_array_equal(new, [*old, old.min(), old.min()])
  assert not surgery.layers(grow(one, 2))[0].state.bias[-2:].any()


def test_new_experts_start_as_copies_or_with_nothing_to_say():
  columns = inputs(ONE, [SAMPLE])
  made = surgery.layers(grow(ONE, 2, columns=columns, copied=False))[0]
  gate = made.params["gate"]["kernel_DE"]
  np.testing.assert_array_equal(gate[:, -1], gate[:, -2])
  np.testing.assert_allclose(gate[:, -1] @ columns[0] / np.linalg.norm(columns[0]), 1,
                             rtol=1e-5)  # fmt: skip
  assert not np.any(made.params["experts"]["down_EFD"][-2:])
  told = surgery.layers(grow(ONE, 2, directions=[(3 * columns[0], -0.5)]))[0]
  gate = told.params["gate"]
  np.testing.assert_array_equal(gate["bias_E"], [0] * cases.E + [-0.5] * 2)
  drawn = gate["kernel_DE"][:, -2:] - 3 * columns[0][:, None]
  assert 0 < np.abs(drawn).max() < 0.1 and np.ptp(drawn, axis=1).all()
  biased = [grow(ONE, 2, bias=x, noise=y) for x, y in
    ((-1.0, 0.5), (np.asarray(-1.0), jnp.float32(0.5)))]  # fmt: skip
  equal(*biased)
  noisy = surgery.layers(grow(ONE, 8, noise=0.1))[0].params["experts"]["up_EDF"]
  assert len(noisy) == cases.E + 8
  copies = noisy[cases.E : 2 * cases.E] - noisy[: cases.E]
  assert 0 < np.abs(copies).std() < 0.2 * noisy.std()


def test_models_over_a_mesh_give_what_those_on_the_host_give():
  mesh = meshes.make("expert=2", devices=jax.devices()[:2])

  def spread(model):
    def put(name, x):
      split = ".experts." in name  # [repeat,E,...]
      spec = PartitionSpec(None, "expert") if split else PartitionSpec()
      return jax.device_put(x, NamedSharding(mesh, spec))

    return model._replace(params={n: put(n, x) for n, x in model.params.items()})

  for change in (
    lambda model: merge.concatenate([model, model]),
    lambda model: upcycle.expand(model, times=2),
    lambda model: grow(model, 2),
    surgery.to_dense,
  ):
    here, there = change(ONE), change(spread(ONE))
    assert here.config == there.config
    jax.tree.map(assert_close, dict(there.params), dict(here.params))


def test_moments_go_with_their_experts():
  random = np.random.default_rng(0)
  first, second = (
    {n: random.normal(size=x.shape).astype(np.float32) for n, x in ONE.params.items()}
    for _ in range(2)
  )
  state = ({"count": np.int32(3)}, (first, second))

  def change(model):
    return surgery.cut_model(model, [[1, 4]])

  count, after = surgery.moments(change, ONE, state)
  assert count == {"count": 3}
  for old, new in zip((first, second), after, strict=True):
    for name, x in new.items():
      if ".experts." in name:
        expected = old[name][:, [1, 4]]
      else:
        expected = old[name][..., [1, 4]] if ".moe.gate.kernel" in name else old[name]
      np.testing.assert_array_equal(x, expected, name)
  some = {n: x for n, x in first.items() if ".moe.gate." not in n}
  with pytest.raises(ValueError, match="has no .*gate.kernel_DE; begin"):
    surgery.moments(change, ONE, (some,))
  with pytest.raises(ValueError, match="no tree by the parameters' names"):
    surgery.moments(change, ONE, (np.zeros(3),))


def test_mistakes_are_named():
  other = ONE._replace(config=dataclasses.replace(CONFIG, tied=False))
  for call, message in (
    (lambda: merge.average([ONE]), "1 model; give two"),
    (lambda: merge.average([ONE, other]), "model 1 is"),
    (lambda: merge.concatenate([ONE, TWO], rest="last"), "rest='last'"),
    (lambda: merge.concatenate([DENSE, DENSE]), "no sparse layer"),
    (lambda: merge.concatenate([ONE, PLAIN]), r"renormalise=never\(\);.*over_chosen"),
    (lambda: merge.mix([ONE, TWO]), "sparse; give a dense block"),
    (lambda: merge.mix([DENSE, DENSE], k=3), "k=3 of 2"),
    (lambda: grow(ONE, 0), "number=0"),
    (lambda: grow(ONE, 1.5), "number=1.5"),  # type: ignore[arg-type]
    (lambda: grow(ONE, 1, noise=np.nan), "noise=nan"),
    (lambda: grow(ONE, 1, bias=np.nan), "bias=nan"),
    (lambda: grow(ONE, 1, bias=np.zeros(2)), r"bias=array\(\[0., 0.\]\)"),  # type: ignore[arg-type]
    (lambda: grow(ONE, 1, bias=1.0, directions=[]), "one of the two"),
    (lambda: flex.join([ONE]), "that `begin` made"),
    (lambda: flex.join([part(0)], k=1), "k=1; give 2 or more"),
    (lambda: flex.without(ONE, 6), "number=6"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
