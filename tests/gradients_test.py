"""Gradients against central differences in float64; what runs nowhere has none."""
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
  capacity,
  combine,
  dispatch,
  experts,
  gates,
  join,
  losses,
  noise,
  presets,
  priority,
  renormalise,
  routers,
  score,
)
from jmoe.types import Context
from jmoe.use import use
from tests import _cases as cases
from tests.tolerance import FINITE_DIFFERENCE

T, D, E, V = 13, 6, 5, 11
GLU = use(experts.glu, d_ff=4, bias=True)
TIGHT = use(capacity.by_factor, factor=0.7)
CONTEXT = Context(
  valid=jnp.arange(T) % 6 != 5,
  position=jnp.arange(T, dtype=jnp.int32),
  token_id=jnp.arange(T, dtype=jnp.int32) % V,
  modality=jnp.arange(T, dtype=jnp.int32) % 2,
  num_rows=1,
)
BALANCED = (use(losses.load_balance), use(losses.router_z), use(losses.importance))


def _config(**fields) -> jmoe.MoEConfig:
  return jmoe.MoEConfig(D, E, **{"experts": GLU, "losses": BALANCED, **fields})


CASES = {
  "top_k, sort, softmax over the chosen": _config(
    router=use(routers.top_k, k=2), renormalise=use(renormalise.over_chosen)
  ),
  "sigmoid, scale, buckets, after dropping, groups": _config(
    score=use(score.sigmoid),
    router=use(routers.top_k, k=3, scale=2.5),
    renormalise=use(renormalise.after_dropping),
    capacity=TIGHT,
    dispatch=use(dispatch.buckets),
    group_size=5,
  ),
  "top_2 by chance, einsum, before dropping": _config(
    router=use(routers.top_2, policy="random", skipped_holds_slot=True),
    renormalise=use(renormalise.before_dropping),
    capacity=TIGHT,
    dispatch=use(dispatch.einsum),
    experts=use(experts.mlp, d_ff=4, activation=jnp.sin),
  ),
  "noisy_top_k with V-MoE's losses, buckets": _config(
    router=use(routers.noisy_top_k, k=2),
    capacity=TIGHT,
    dispatch=use(dispatch.buckets),
    losses=(use(losses.importance), use(losses.load)),
    experts=use(experts.mlp, d_ff=4, activation=jnp.tanh, bias=True),
  ),
  "jitter, cosine gate, weights on the input, shared expert": _config(
    input_noise=use(noise.jitter, eps=0.1),
    gate=use(gates.cosine, d_project=3),
    scale="input",
    shared=use(experts.glu, d_ff=3),
    join=use(join.blend),
  ),
  "gate per modality with entropies, constant and copy experts": _config(
    gate=use(gates.per_modality, num_modalities=2),
    losses=(
      use(losses.entropy_local, modality=0),
      use(losses.entropy_global, modality=1),
    ),
    experts=use(experts.with_free, base=GLU, constant=1, copy=1),
    shared=use(experts.mlp, d_ff=3, activation=jnp.sin),
    join=use(join.sigmoid_gate),
  ),
  "expert choice, buckets": _config(
    router=use(routers.expert_choice, capacity_factor=1.5),
    dispatch=use(dispatch.buckets),
    losses=(use(losses.router_z),),
  ),
  "expert choice, einsum": _config(
    router=use(routers.expert_choice, capacity_factor=1.5),
    dispatch=use(dispatch.einsum),
    losses=(),
  ),
  "every expert, a gate per task": _config(
    router=use(routers.every_expert),
    combine=use(combine.stack),
    aggregate=use(aggregate.per_task, num_tasks=2),
  ),
  "hashed, bounded buffer, clamped experts": _config(
    gate=use(gates.none),
    router=use(routers.hashed, vocab_size=V),
    max_rows=0.8,
    experts=use(experts.clamped_glu, d_ff=4),
    losses=(),
  ),
  "top_2 by sampling, buckets of one, after dropping": _config(
    router=use(routers.top_2, policy="sampling"),
    renormalise=use(renormalise.after_dropping),
    capacity=use(capacity.fixed, slots=1),
    dispatch=use(dispatch.buckets),
    priority=use(priority.by_weight),
  ),
  "relu scores, weights on the input of a bounded buffer": _config(
    score=use(score.relu),
    router=use(routers.top_k, k=3),
    renormalise=use(renormalise.before_dropping),
    scale="input",
    max_rows=0.6,
  ),
  "every expert, weights on the input, einsum": _config(
    score=use(score.sqrt_softplus),
    router=use(routers.every_expert),
    renormalise=use(renormalise.after_dropping),
    capacity=use(capacity.fixed, slots=4),
    dispatch=use(dispatch.einsum),
    scale="input",
    group_size=5,
  ),
  "soft": presets.soft_moe.layer(d_model=D, d_ff=4, num_experts=E),
}


def _drawn(config: jmoe.MoEConfig, dtype):
  """Parameters away from zero, so that no gradient is small by accident."""
  params = jmoe.moe_init(jax.random.key(0), config)
  leaves, tree = jax.tree.flatten(params)
  r = np.random.default_rng(3)
  leaves = [jnp.asarray(0.7 * r.normal(size=a.shape), dtype) for a in leaves]
  return jax.tree.unflatten(tree, leaves), jnp.asarray(r.normal(size=(T, D)), dtype)


def _objective(config: jmoe.MoEConfig):
  """A scalar of the output and the losses, in training."""
  key = jax.random.key(5)

  def objective(params, x):
    state = jmoe.init_state(config, params, key)
    y, info = jmoe.moe(
      params, x, config, context=CONTEXT, state=state, key=key, train=True
    )
    wave = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.sum(y * wave) + sum(
      (jnp.sum(v).astype(y.dtype) for v in info.losses.values()), jnp.zeros((), y.dtype)
    )

  return objective


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_central_differences(name):
  config = CASES[name]
  with cases.enable_x64(), cases.quickly():
    params, x = _drawn(config, jnp.float64)
    objective = jax.jit(jax.value_and_grad(_objective(config), (0, 1)))
    _, grads = objective(params, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, (params, x))
    r, step = np.random.default_rng(4), 1e-5
    point, tree = jax.tree.flatten((params, x))
    for i, (at, gradient) in enumerate(zip(point, jax.tree.leaves(grads), strict=True)):
      for _ in range(2):  # random directions: every entry has a say
        way = r.normal(size=at.shape)

        def value(t, i=i, at=at, way=way):
          moved = [*point[:i], at + t * way, *point[i + 1 :]]
          return float(objective(*jax.tree.unflatten(tree, moved))[0])

        slope = (value(step) - value(-step)) / (2 * step)
        np.testing.assert_allclose(
          float(np.sum(np.asarray(gradient) * way)), slope, **FINITE_DIFFERENCE
        )


def test_a_change_of_one_field_changes_the_gradient():
  # The comparison above can fail: with the wrong weights it does.
  config = CASES["top_k, sort, softmax over the chosen"]
  wrong = dataclasses.replace(config, renormalise=use(renormalise.never))
  params, x = _drawn(config, jnp.float32)
  with cases.quickly():
    grads = [jax.grad(_objective(c), 1)(params, x) for c in (config, wrong)]
  assert float(jnp.abs(grads[0] - grads[1]).max()) > 1e-2


# -- what runs nowhere -----------------------------------------------------------------

ROWS = [  # router, capacity, dispatch, renormalise, extra
  ("top_k 2, bias, scale", "one", "buckets", "before_dropping", ""),
  ("top_k 2 of relu", "one", "einsum", "after_dropping", ""),
  ("top_k 1", "bounded", "sort", "never", "input"),
  ("top_2 random, holds", "one", "buckets", "over_chosen", "input"),
  ("hashed", "bounded", "sort", "never", ""),
  ("expert_choice tight", "own", "buckets", "never", ""),
]


def config_of(entry, num_experts: int) -> jmoe.MoEConfig:
  names = ("router", "capacity", "dispatch", "renormalise", "extra")
  row = dict(zip(names, entry, strict=True))
  if row["router"] == "expert_choice tight":
    row["router"] = "expert_choice"
    few = use(routers.expert_choice, capacity_factor=0.5)
    return cases.config_of(row, num_experts, router=few)
  return cases.config_of(row, num_experts)


each_row = pytest.mark.parametrize("entry", ROWS, ids=lambda e: "-".join(e[:3]))


def gradients(config, drawn):
  """Output, information, and gradients by parameters and x; operation by operation."""
  params = cases.params_of(config, drawn.scale)

  def total(params, x):
    y, info = jmoe.moe(
      params,
      x,
      config,
      context=drawn.context(),
      state=cases.state_of(config),
      key=cases.key_of(drawn),
      train=True,
      with_plan=True,
    )
    return jnp.sum(jnp.sin(y)), (y, info)

  with cases.by_operation():
    both = jax.grad(total, (0, 1), has_aux=True)
    found, (y, info) = both(params, jnp.asarray(drawn.x))
  return y, info, found


@each_row
def test_dropped_and_padding_tokens_get_zero_and_no_gradient(entry):
  drawn = cases.draw("padding", T, 7, 2)
  y, info, (_, d_x) = gradients(config_of(entry, 7), drawn)
  served = np.zeros(T, bool)
  served[np.asarray(info.plan.routing.token)[np.asarray(info.plan.kept)]] = True
  assert served.any() and (drawn.valid_or_all & ~served).any()
  for array in (y, d_x):
    assert not np.any(np.asarray(array)[~served])
    assert np.all(np.any(np.asarray(array)[served], axis=1))


@each_row
@pytest.mark.parametrize("kind", ["one expert", "all padding"])
def test_experts_without_tokens_get_zero_gradient(entry, kind):
  _, info, (d_params, d_x) = gradients(config_of(entry, 7), cases.draw(kind, T, 7, 3))
  chex.assert_tree_all_finite((d_params, d_x))
  idle = np.ones(7, bool)
  idle[np.asarray(info.plan.routing.expert)[np.asarray(info.plan.kept)]] = False
  for name, gradient in d_params["experts"].items():
    rows = np.asarray(gradient).reshape(7, -1)
    np.testing.assert_array_equal(np.any(rows, axis=1), ~idle, name)
  if kind == "all padding":
    assert not any(np.any(g) for g in jax.tree.leaves((d_params, d_x)))


def test_float64_activations_are_routed_in_float64():
  config = config_of(("top_k 1", "dropless", "sort", "never", ""), 3)
  with cases.enable_x64():
    x = jnp.asarray(cases.draw("random", T, 3, 6).x, jnp.float64)
    y, info = jmoe.moe(
      cases.params_of(config, dtype=np.float64),
      x,
      config,
      context=Context(valid=jnp.ones(T, bool)),
      with_plan=True,
    )
  assert y.dtype == info.plan.routing.weight.dtype == jnp.float64
  assert info.load.dtype == jnp.int32
