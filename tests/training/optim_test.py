"""The optimizer: stacks of matrices, schedules, precision, what it refuses."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import configs, optim
from experiments.config import Optim
from tests.tolerance import assert_close
from tests.training.optimizers import (
  EXPERT,
  KINDS,
  SHAPES,
  draw,
  moved,
  plain,
  repeated,
)

DECAYED = {n for n in SHAPES if n.endswith(("query.kernel", "_EDF"))}


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
