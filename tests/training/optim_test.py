"""The optimizer: roles, stacks of matrices, precision, accumulation, what is frozen."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import configs, optim, state as states
from experiments.config import Optim
from experiments.optim import roles
from jmoe import gates, presets, use
from jmoe.config import Attention, BlockConfig, Dense, ModelConfig, simple
from tests.presets_test import TABLE
from tests.tolerance import assert_close
from tests.training.conftest import QUICK

KINDS = ("adamw", "adafactor", "muon")
EXPERT = "segments.0.0.moe.experts."
# Every parameter that a `Decoder` can have: its role, and whether it is a matrix.
EXPECTED = {
  "embed.embedding": ("embedding", False),
  "unembed.kernel": ("embedding", False),
  "norm.scale": ("norm", False),
  "norm.bias": ("norm", False),
  "attention_norm.scale": ("norm", False),
  "attention_norm.bias": ("norm", False),
  "ff_norm.scale": ("norm", False),
  "ff_norm.bias": ("norm", False),
  "attention.query.kernel": ("matrix", True),
  "attention.key.kernel": ("matrix", True),
  "attention.value.kernel": ("matrix", True),
  "attention.out.kernel": ("matrix", True),
  "ff.gate.kernel": ("matrix", True),
  "ff.up.kernel": ("matrix", True),
  "ff.down.kernel": ("matrix", True),
  "moe.gate.kernel_DE": ("gate", False),
  "moe.gate.bias_E": ("gate", False),
  "moe.gate.hidden_DH": ("gate", False),
  "moe.gate.out_HE": ("gate", False),
  "moe.gate.previous_EE": ("gate", False),
  "moe.gate.slot_DEC": ("gate", False),
  "moe.gate.scale": ("gate", False),
  "moe.gate.project_DP": ("gate", False),
  "moe.gate.bias_P": ("gate", False),
  "moe.gate.centre_PE": ("gate", False),
  "moe.gate.log_scale": ("gate", False),
  "moe.aggregate.kernel_MDE": ("gate", False),
  "moe.join.gate_D": ("gate", False),
  "moe.join.kernel_D2": ("gate", False),
  "moe.join.bias_2": ("gate", False),
  "moe.shared.gate_EDF": ("shared", True),
  "moe.shared.up_EDF": ("shared", True),
  "moe.shared.down_EFD": ("shared", True),
  "moe.shared.up_bias_EF": ("shared", False),
  "moe.shared.down_bias_ED": ("shared", False),
  "moe.experts.gate_EDF": ("expert", True),
  "moe.experts.up_EDF": ("expert", True),
  "moe.experts.down_EFD": ("expert", True),
  "moe.experts.gate_up_EDF": ("expert", True),
  "moe.experts.up_bias_EF": ("expert", False),
  "moe.experts.gate_up_bias_EF": ("expert", False),
  "moe.experts.down_bias_ED": ("expert", False),
  "moe.experts.base.gate_EDF": ("expert", True),
  "moe.experts.base.up_EDF": ("expert", True),
  "moe.experts.base.down_EFD": ("expert", True),
  "moe.experts.mix_CD2": ("expert", True),
  "moe.experts.constant_CD": ("expert", False),
}


def published():
  for name, sizes in TABLE.items():
    module, _, function = name.partition(".")
    yield getattr(getattr(presets, module), function)(**sizes)
  yield simple(16, 8, num_experts=4, gate=use(gates.cosine))


def test_every_parameter_of_every_model_has_its_role():
  attention = Attention(num_heads=2, causal=False)
  blocks = [BlockConfig(attention, ff, norm="layer") for ff in published()]
  blocks.append(BlockConfig(attention, Dense(d_ff=8)))
  segments = tuple(((block,), 3) for block in blocks)
  model = ModelConfig(11, 16, segments, norm="layer", tied=False)
  found = set()
  for name, shape in states.blueprint(model)[1].items():
    inside = name.startswith("segments.")
    local = ".".join(name.split(".")[3:]) if inside else name
    assert (optim.role(name), roles.is_matrix(name, shape)) == EXPECTED[local], name
    stack = shape.shape[: roles.stacked(name)]
    experts = optim.role(name) in ("expert", "shared")
    assert len(stack) == inside + experts and stack[:1] == (3,) * inside, name
    found.add(local)
  assert found == set(EXPECTED)
  assert {role for role, _ in EXPECTED.values()} == set(optim.ROLES)


def test_a_parameter_of_no_known_model_has_no_role():
  for name in ("head.kernel", "segments.0.0.moe.gates.kernel_DE", "segments.0.0.ff"):
    with pytest.raises(ValueError, match=f"parameter '{name}' has no role"):
      optim.role(name)


def plain(**values) -> Optim:
  """Updates of size one, nothing clipped or decayed, unless said otherwise."""
  given = {"schedule": "constant", "clip": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
  return Optim(**({"learning_rate": 1.0} | given | values))


def draw(shapes, seed=0, dtype="float32"):
  """NumPy's, whose slices compile nothing."""
  random = np.random.default_rng(seed)
  dtype = jnp.dtype(dtype)
  return {n: random.normal(size=s).astype(dtype) for n, s in shapes.items()}


@functools.partial(jax.jit, static_argnames="optimizer", compiler_options=QUICK)
def moved(optimizer, params, grads):
  """All updates of several gradients, summed, and the last state."""

  def one(carry, grad):
    total, state = carry
    updates, state = optimizer.update(grad, state, params)
    return (jax.tree.map(jnp.add, total, updates), state), None

  # optax by itself, as a reference, mixes dtypes.
  with jax.numpy_dtype_promotion("standard"):
    start = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    return jax.lax.scan(one, start, stacked)[0]


def test_adafactor_is_that_of_each_expert_and_layer_alone():
  """At sizes where optax by itself would factor over experts, and over layers."""
  expert, gate = EXPERT + "up_EDF", "segments.0.0.moe.gate.kernel_DE"
  norm = "segments.1.0.ff_norm.scale"
  shapes = {expert: (2, 160, 128, 129), gate: (2, 128, 160), norm: (130, 128)}
  params, grads = draw(shapes), [draw(shapes, seed) for seed in (1, 2)]
  # Experts and layers that differ in size, so that a shared moment would show.
  for name, shape in shapes.items():
    loud = np.float32(10) ** (np.arange(shape[0] * shape[1]) % 5).astype(np.float32)
    for grad in grads:
      grad[name] *= loud.reshape(*shape[:2], *[1] * (len(shape) - 2))
  optimizer = optim.optimizer(plain(kind="adafactor"), steps=9, params=params)
  ours, state = moved(optimizer, params, grads)
  whole, factored = optax.adafactor(1.0, factored=False), optax.adafactor(1.0)
  for name, places, reference in (
    (expert, [(0, 0), (0, 7), (1, 3), (1, 159)], factored),
    (gate, [(0,), (1,)], whole),
    (norm, [(0,), (64,), (129,)], whole),
  ):
    for place in places:
      expected, _ = moved(
        reference, params[name][place], [g[name][place] for g in grads]
      )
      assert_close(ours[name][place], expected, f"{name} {place}")
  for name in (gate, norm):
    naive, _ = moved(factored, params[name], [g[name] for g in grads])
    assert not np.allclose(ours[name], naive, rtol=0.1), name
  kept = {n: sum(x.size for x in jax.tree.leaves(state.chain[1][n])) for n in shapes}
  assert kept[gate] > 2 * 128 * 160
  assert kept[expert] == 2 * 160 * (128 + 129 + 1 + 1)  # and a count


def test_muon_is_that_of_each_expert_and_layer_alone():
  matrices = {
    EXPERT + "up_EDF": (2, 3, 8, 6),
    EXPERT + "down_EFD": (2, 3, 6, 8),
    "segments.0.0.moe.shared.up_EDF": (2, 1, 8, 6),
    "segments.0.0.attention.query.kernel": (2, 8, 6),
  }
  others = {
    EXPERT + "up_bias_EF": (2, 3, 6),  # looks like two matrices
    "segments.0.0.moe.gate.kernel_DE": (2, 8, 3),
    "segments.0.0.ff_norm.scale": (2, 8),
    "embed.embedding": (11, 8),
  }
  shapes = matrices | others
  params, grads = draw(shapes), [draw(shapes, seed) for seed in (1, 2)]
  optimizer = optim.optimizer(plain(kind="muon"), steps=9, params=params)
  ours, _ = moved(optimizer, params, grads)
  muon = optax.contrib.muon(1.0, consistent_rms=0.2)
  for name, shape in matrices.items():
    for place in np.ndindex(*shape[:-2]):
      expected, _ = moved(muon, params[name][place], [g[name][place] for g in grads])
      assert_close(ours[name][place], expected, f"{name} {place}")
  adam = optax.adam(1.0, b1=0.9, b2=0.95)
  expected, _ = moved(
    adam, {n: params[n] for n in others}, [{n: g[n] for n in others} for g in grads]
  )
  for name in others:
    assert_close(ours[name], expected[name], name)


SHAPES = {
  "embed.embedding": (7, 4),
  "segments.0.0.attention.query.kernel": (2, 4, 4),
  "segments.0.0.ff_norm.scale": (2, 4),
  "segments.0.0.moe.gate.kernel_DE": (2, 4, 3),
  "segments.0.0.moe.shared.up_EDF": (2, 1, 4, 5),
  "segments.0.0.moe.shared.up_bias_EF": (2, 1, 5),
  EXPERT + "up_EDF": (2, 3, 4, 5),
  EXPERT + "up_bias_EF": (2, 3, 5),
}
DECAYED = {n for n in SHAPES if n.endswith(("query.kernel", "_EDF"))}


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay_and_a_role_has_its_factor(kind):
  config = plain(
    kind=kind, weight_decay=0.5, role_factors=(("gate", 0.0), ("shared", 3.0))
  )
  params = draw(SHAPES)
  optimizer = optim.optimizer(config, steps=9, params=params)
  zeros = {n: np.zeros_like(x) for n, x in params.items()}
  updates, _ = moved(optimizer, params, [zeros])
  for name, param in params.items():
    factor = 3.0 if ".shared." in name else 1.0
    expected = -0.5 * factor * param if name in DECAYED else zeros[name]
    assert_close(updates[name], expected, name)
  updates, _ = moved(optimizer, params, [params])
  for name, update in updates.items():
    assert bool(np.any(update != 0)) == (".moe.gate." not in name), name


@pytest.mark.parametrize(
  ("schedule", "sizes"),
  [
    ("cosine", [0, 0.5, 1, 1 - 0.9 * (1 - math.cos(math.pi / 4)) / 2, 0.55, None, 0.1]),
    ("linear", [0, 0.5, 1, 0.775, 0.55, 0.325, 0.1]),
    ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
  ],
)
def test_a_schedule_warms_up_then_follows_its_curve_to_its_fraction(schedule, sizes):
  config = plain(schedule=schedule, warmup_steps=2, end_fraction=0.1)
  rate = optim.schedule(config, 6)
  later = optim.schedule(dataclasses.replace(config, warmup_steps=6, accumulate=3), 18)
  for update, size in enumerate(sizes):
    if size is not None:
      np.testing.assert_allclose(rate(update), size, atol=1e-6)
      # Lengths are in batches, of which three are one update.
      np.testing.assert_allclose(later(update), size, atol=1e-6)
  at_once = optim.schedule(dataclasses.replace(config, warmup_steps=0), 6)
  np.testing.assert_allclose(at_once(0), 1)


def test_the_schedule_moves_once_an_update():
  name = "embed.embedding"
  params = {name: np.ones(1, np.float32)}
  config = plain(schedule="linear", end_fraction=0.0, accumulate=2)
  optimizer = optim.optimizer(config, steps=8, params=params)
  state, sizes = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for _ in range(8):
    updates, state = update(params, state, params)
    sizes.append(-float(updates[name][0]))
  np.testing.assert_allclose(sizes, [0, 1, 0, 0.75, 0, 0.5, 0, 0.25], atol=1e-5)


def test_the_norm_of_all_gradients_is_clipped():
  """AdamW's epsilon shows it: gradients clipped to 1e-9 are lost beside one of 1e-8."""
  params = draw({"embed.embedding": (2, 3), "norm.scale": (3,)})
  grads = {n: np.full_like(x, 1e-6) for n, x in params.items()}
  size = {}
  for clip in (0.0, 1e-9, 1.0):
    optimizer = optim.optimizer(plain(clip=clip), steps=9, params=params)
    size[clip] = optax.tree.norm(moved(optimizer, params, [grads])[0])
  assert size[1.0] == size[0.0] > 10 * size[1e-9]


@functools.partial(
  jax.jit, static_argnames=("optimizer", "times"), compiler_options=QUICK
)
def repeated(optimizer, params, grad, times):
  """Parameters, state and the last updates after one gradient many times."""

  def one(_, carry):
    params, state, _ = carry
    updates, state = optimizer.update(grad, state, params)
    with jax.numpy_dtype_promotion("standard"):
      return optax.apply_updates(params, updates), state, updates

  zeros = {n: jnp.zeros(x.shape) for n, x in params.items()}
  return jax.lax.fori_loop(0, times, one, (params, optimizer.init(params), zeros))


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tiny_updates_of_bfloat16_move_as_in_float32(kind):
  """A single one, of about 1e-5, is far less than the last bit of a bfloat16."""
  some = {n: SHAPES[n] for n in ("embed.embedding", "segments.0.0.ff_norm.scale")}
  some |= {EXPERT + "up_EDF": SHAPES[EXPERT + "up_EDF"]}
  drawn, grad = draw(some, dtype="bfloat16"), draw(some, seed=1)
  drawn["segments.0.0.ff_norm.scale"] = np.ones((2, 4), np.float32)
  full = {n: x.astype(np.float32) for n, x in drawn.items()}
  config = plain(kind=kind, learning_rate=1e-5)
  (narrow, state, _), (wide, *_) = (
    repeated(optim.optimizer(config, steps=9, params=params), params, grad, 1000)
    for params in (drawn, full)
  )
  for name, param in drawn.items():
    assert narrow[name].dtype == param.dtype, name
    end = np.asarray(wide[name])
    assert np.abs(end - full[name]).max() > 2e-3, name
    # Both programs sum float32 updates, but may round them apart: where the sum is
    # close to the middle of two bfloat16s, they then take one each.
    expected = end.astype(param.dtype).astype(np.float32)
    if name in state.master:
      rounded = state.master[name].astype(param.dtype)
      np.testing.assert_array_equal(narrow[name], rounded, err_msg=name)
    found = np.asarray(narrow[name]).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-7, err_msg=name)
    assert (found == expected).mean() > 0.95, name


def test_copies_of_bfloat16_parameters_begin_as_they_were_drawn():
  drawn = draw({n: SHAPES[n] for n in ("embed.embedding", EXPERT + "up_EDF")})
  shapes = {n: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for n, x in drawn.items()}
  optimizer = optim.optimizer(plain(), steps=9, params=shapes)
  state = optimizer.init(drawn)
  for name, param in drawn.items():
    np.testing.assert_array_equal(state.master[name], param)
  with pytest.raises(ValueError, match="is float32, but it was made for bfloat16"):
    optimizer.update(drawn, state, drawn)


FREEZE = ("gate", "shared", "experts:0,2", "norm")


@pytest.mark.parametrize(
  ("kind", "dtype"), [(kind, "float32") for kind in KINDS] + [("adamw", "bfloat16")]
)
def test_what_is_frozen_keeps_every_bit_and_counts_in_no_norm(kind, dtype):
  params = draw(SHAPES, dtype=dtype)
  for param in params.values():
    param[0] = -0.0  # the sign is a bit too
  config = plain(kind=kind, clip=0.1, weight_decay=0.5, freeze=FREEZE)
  optimizer = optim.optimizer(config, steps=9, params=params)
  grad = draw(SHAPES, seed=1)

  def is_frozen(name):
    mask = np.zeros(SHAPES[name], bool)
    if any(f".moe.{part}." in name for part in ("gate", "shared")) or "norm" in name:
      mask[:] = True
    if EXPERT in name:
      mask[:, [0, 2]] = True
    return mask

  loud = {n: np.where(is_frozen(n), 1e6 * g, g) for n, g in grad.items()}
  quiet = {n: np.where(is_frozen(n), 0 * g, g) for n, g in grad.items()}
  (after, state, updates), (other, *_) = (
    repeated(optimizer, params, g, 3) for g in (loud, quiet)
  )
  for name, param in params.items():
    mask = is_frozen(name)
    bits = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (param, after[name]))
    before, now = bits
    np.testing.assert_array_equal(now[mask], before[mask], err_msg=name)
    # Whoever adds them: XLA leaves out a sum with a constant zero of either sign.
    assert np.signbit(updates[name])[mask].all() and not np.any(
      updates[name], where=mask
    )
    if name in state.master:
      copy = np.asarray(state.master[name])
      np.testing.assert_array_equal(copy[mask], param[mask].astype(np.float32))
    if not mask.all():
      assert (now != before)[~mask].mean() > 0.9, name
    np.testing.assert_array_equal(after[name], other[name], err_msg=name)
  held = jax.eval_shape(optimizer.init, params)
  shapes = {x.shape for x in jax.tree.leaves(held)}
  assert SHAPES["segments.0.0.moe.gate.kernel_DE"] not in shapes  # nor any moments


def test_experts_beside_free_ones_are_numbered_through():
  shapes = {EXPERT + "base.up_EDF": (1, 3, 4, 5), EXPERT + "constant_CD": (1, 2, 4)}
  params = draw(shapes)
  grad = {n: np.ones_like(x) for n, x in params.items()}
  optimizer = optim.optimizer(plain(freeze=("experts:1,4",)), steps=9, params=params)
  updates, _ = moved(optimizer, params, [grad])
  still = {n: np.all(u == 0, axis=tuple(range(2, u.ndim))) for n, u in updates.items()}
  assert still[EXPERT + "base.up_EDF"].tolist() == [[False, True, False]]
  assert still[EXPERT + "constant_CD"].tolist() == [[False, True]]
  with pytest.raises(ValueError, match="has 5 with parameters; give numbers of 0 to 4"):
    optim.optimizer(plain(freeze=("experts:5",)), steps=9, params=params)


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"freeze": ("gates",)}, "freeze='gates'; did you mean 'gate'"),
    ({"freeze": ("experts",)}, "did you mean 'expert'"),
    ({"freeze": ("experts:0,x",)}, "give the numbers of experts, as in 'experts:0,3'"),
    ({"freeze": ("experts:3",)}, "names expert 3, but segments.0.0.moe has 3"),
    ({"freeze": ("experts:-1",)}, "give the numbers of experts"),
    ({"freeze": optim.ROLES}, "no parameter of that role"),
    ({"freeze": tuple(r for r in optim.ROLES if r != "matrix")}, "nothing to train"),
    (
      {"role_factors": (("gat", 1.0),)},
      "role_factors names 'gat'; did you mean 'gate'",
    ),
    ({"accumulate": 10}, "accumulate=10 is more than steps=9"),
  ],
)
def test_what_cannot_be_meant_is_one_line(values, said):
  params = draw({n: s for n, s in SHAPES.items() if "attention" not in n})
  with pytest.raises(ValueError, match=said) as found:
    optim.optimizer(plain(**values), steps=9, params=params)
  assert "\n" not in str(found.value)


def test_every_setting_of_the_optimizer_is_in_the_policy():
  run = configs.load("micro")
  base = optim.policy(run)
  assert set(base) == {"parameters", "activations", "moments", "router", "optimizer"}
  others = dict(
    learning_rate=0.5,
    warmup_steps=1,
    kind="muon",
    schedule="linear",
    end_fraction=0.5,
    weight_decay=0.7,
    b1=0.5,
    b2=0.6,
    clip=3.0,
    accumulate=2,
    role_factors=(("gate", 0.25),),
    freeze=("experts:1",),
  )
  assert set(others) == {field.name for field in dataclasses.fields(Optim)}
  for name, value in others.items():
    changed = dataclasses.replace(run.optim, **{name: value})
    found = optim.policy(dataclasses.replace(run, optim=changed))
    assert found["optimizer"] != base["optimizer"], name
  narrow = optim.policy(dataclasses.replace(run, param_dtype="bfloat16"))
  assert "bfloat16" in narrow["parameters"] and "bfloat16" not in base["parameters"]
