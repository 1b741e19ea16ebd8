"""AdamW inside the backward pass; and the step of OLMoE's shape that is built on it."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import state as states
from experiments.benchmarks.olmoe_step import budget, training
from experiments.benchmarks.olmoe_step.size import TINY, Size
from experiments.optim.in_backward import AdamW, updated_in_backward
from jmoe.analysis import cost
from jmoe.presets import olmoe
from tests import jaxprs
from tests.tolerance import assert_close
from tests.training.conftest import QUICK


def test_updates_are_those_of_optax():
  ours = AdamW(1e-2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1)
  theirs = optax.adamw(1e-2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1)
  random = np.random.default_rng(0)
  params = {name: jnp.asarray(random.normal(size=5), jnp.float32) for name in "ab"}
  moments, state, expected = ours.init(params), theirs.init(params), params
  for step in range(1, 4):
    grads = {name: jnp.asarray(random.normal(size=5), jnp.float32) for name in "ab"}
    scale = ours.corrections(jnp.asarray(step, jnp.int32))
    params, moments = ours.update(grads, params, moments, scale)
    with jax.numpy_dtype_promotion("standard"):
      moves, state = theirs.update(grads, state, expected)
    expected = optax.apply_updates(expected, moves)
    jax.tree.map(assert_close, params, expected)


def test_narrow_moments_are_rounded_once():
  ours, narrow = AdamW(1e-2), jnp.bfloat16
  params = jnp.linspace(0.5, 2, 7, dtype=narrow)
  grads = jnp.linspace(-1, 1, 7, dtype=narrow)
  scale = ours.corrections(jnp.asarray(1, jnp.int32))
  found = ours.update(grads, params, ours.init(params), scale)
  wide = params.astype(jnp.float32)
  expected = ours.update(grads.astype(jnp.float32), wide, ours.init(wide), scale)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert a.dtype == narrow
    np.testing.assert_array_equal(a, b.astype(narrow))


def test_gradients_of_what_is_tapped_are_new_values():
  ours, w, x = AdamW(0.1), jnp.array([2.0, -1.0]), jnp.array([3.0, 5.0])
  moments, scale = ours.init(w), ours.corrections(jnp.asarray(1, jnp.int32))

  def loss(w, moments, x, tap):
    if tap:
      w, x = updated_in_backward(ours, scale, w, moments, x)
    return jnp.sum(jnp.square(w * x))

  new, new_moments, dx = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(
    w, moments, x, True
  )
  dw, _, expected = jax.grad(loss, (0, 1, 2))(w, moments, x, False)
  after, after_moments = ours.update(dw, w, moments, scale)
  jax.tree.map(assert_close, (new, new_moments, dx), (after, after_moments, expected))
  made = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)), static_argnums=3)(
    w, moments, x, True
  )
  assert sum(e.primitive.name == "optimization_barrier" for e in made.eqns) == 2


def compiled(blueprint, state, *, in_backward):
  """The step on random tokens: state -> (state, metrics)."""
  shape = (TINY.rows, TINY.seq)
  ids = np.random.default_rng(7).integers(0, TINY.vocab, shape).astype(np.int32)
  step = functools.partial(
    training.train_step, blueprint=blueprint, chunk=24, in_backward=in_backward
  )
  with jax.numpy_dtype_promotion("standard"):  # attention's gradient mixes dtypes
    step = jax.jit(step, donate_argnums=0).lower(state, ids)
  step = step.compile(compiler_options=QUICK)
  return lambda state: step(state, ids)


def test_a_step_starts_at_the_uniform_guess_and_learns_a_batch():
  blueprint, like = training.shapes(training.config(TINY, "most"))
  state = training.drawn(like)
  step = compiled(blueprint, state, in_backward=True)
  losses = []
  for _ in range(8):
    state, metrics = step(state)
    losses.append(float(metrics["loss"]))
  assert abs(losses[0] - np.log(TINY.vocab)) < 0.2
  assert losses[-1] < losses[0] - 0.1 and np.all(np.diff(losses) < 0)
  assert int(state["step"]) == 8
  for name, x in state["params"].items():
    assert np.all(np.isfinite(x.astype(np.float32))), name
    small = name.endswith(("scale", "kernel_DE"))
    assert x.dtype == (jnp.float32 if small else jnp.bfloat16), name
  for moment in state["moments"]:
    assert {n: x.dtype for n, x in moment.items()} == {
      n: x.dtype for n, x in state["params"].items()
    }


def test_updates_in_the_backward_pass_are_those_after_it():
  """In float32: layers one by one and updated early, and in a loop and at the end."""
  random, sides = np.random.default_rng(0), {}
  for in_backward in (True, False):
    model = training.config(TINY, "hidden", loop=not in_backward)
    model = dataclasses.replace(model, dtype="float32")
    blueprint, like = states.blueprint(model)
    if in_backward:
      apart = {n: random.normal(size=x.shape) * 0.05 for n, x in like.items()}
      params = apart
    else:
      params = {name: stacked(name, apart) for name in like}
    params = {n: jnp.asarray(x, jnp.float32) for n, x in params.items()}
    state = {"step": jnp.zeros((), jnp.int32), "params": params}
    state |= {"moments": training.OPTIMIZER.init(params)}
    step = compiled(blueprint, state, in_backward=in_backward)
    for _ in range(2):
      state, metrics = step(state)
    sides[in_backward] = metrics["total"], (state["params"], *state["moments"])
  assert_close(sides[True][0], sides[False][0])
  for early, late in zip(sides[True][1], sides[False][1], strict=True):
    for name, x in late.items():
      own = stacked(name, early)
      gap = np.linalg.norm(own - x) / np.linalg.norm(x)
      assert gap < 1e-4, (name, gap)


def stacked(name, apart):
  """An array of the model in a loop, from those of its layers one by one."""
  if not name.startswith("segments."):
    return apart[name]
  rest = name.removeprefix("segments.0.")
  return np.concatenate([apart[f"segments.{n}.{rest}"] for n in range(TINY.layers)])


def test_no_array_of_a_step_holds_all_logits():
  size = dataclasses.replace(TINY, vocab=5000, rows=4)
  blueprint, like = training.shapes(training.config(size, "most"))
  step = functools.partial(
    training.train_step, blueprint=blueprint, chunk=16, in_backward=True
  )
  state = jax.eval_shape(lambda: training.drawn(like))
  ids = jax.ShapeDtypeStruct((size.rows, size.seq), jnp.int32)
  with jax.numpy_dtype_promotion("standard"):
    made = jax.make_jaxpr(step)(state, ids)
  of_vocabulary = {a.shape for a in jaxprs.arrays(made) if size.vocab in a.shape}
  assert (16, size.vocab) in of_vocabulary
  most = {np.prod(shape) for shape in of_vocabulary}
  assert max(most) == size.d_model * size.vocab  # a matrix, not the logits


def test_sizes_are_those_of_the_published_model():
  size, model = Size(), olmoe.MODELS["1b-7b"]
  counted = cost.parameters(model)
  assert size.params == counted.total == 6_919_161_856
  assert size.active == counted.active - size.d_model * size.vocab == 1_178_994_688
  (((block,), repeat),) = model.segments
  ff = dataclasses.replace(block.ff, experts=block.ff.experts.replace(pieces=1))
  block = dataclasses.replace(block, ff=ff)
  whole = dataclasses.replace(model, segments=(((block,), repeat),))
  assert training.config(size, "nothing", loop=True) == whole
  _, like = training.shapes(training.config(TINY, "most"))
  assert sum(np.prod(x.shape) for x in like.values()) == TINY.params


def test_the_budget_counts_what_blocks_keep(capsys):
  kept = {keep: budget.kept_by_a_block(TINY, keep) for keep in ("nothing", "most")}
  width = 2 * TINY.tokens * TINY.d_model  # bytes of the tokens in bfloat16
  assert kept["nothing"] == width
  assert kept["most"] > 6 * width
  found = budget.shown(TINY, "most", loop=False, chunk=None)
  assert found["moments"] == 2 * found["parameters"]
  assert "peak" in capsys.readouterr().out
