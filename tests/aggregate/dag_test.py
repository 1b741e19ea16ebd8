"""Messages among a token's experts (DAG-MoE)."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe import (
  Context,
  aggregate,
  capacity,
  checks,
  combine,
  dispatch,
  experts,
  routers,
)
from jmoe.analysis import cost
from jmoe.config import Attention, BlockConfig
from jmoe.models.blocks import Block, normed
from jmoe.use import use
from tests import _cases as cases, oracle
from tests.jaxprs import arrays
from tests.tolerance import assert_close

T, D, M, E, K = 7, 6, 4, 5, 3
ACTIVATIONS = {
  jax.nn.silu: lambda e: e * oracle.sigmoid(e),
  jax.nn.sigmoid: oracle.sigmoid,
}


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def by_loops(params, y, weight, kept, h, *, activation, gated):
  """The definition: a token, a receiver and a sender at a time, pairs put together."""
  out = np.zeros((T, D))
  for t in range(T):
    K = y.shape[1]
    nodes = [weight[t, i] * kept[t, i] * y[t, i] + h[t] / K for i in range(K)]
    for scale, down, mix, up in zip(
      *(params[n] for n in ("scale_LD", "down_LDM", "mix_LMPM", "up_LMD")), strict=True
    ):
      u = [n / np.sqrt((n**2).mean() + 1e-6) * scale @ down for n in nodes]
      # W_edge and W_node, [2M, M]: the receiver's half over the sender's.
      matrices = [
        np.concatenate([mix[:, p], mix[:, p + 1]]) for p in range(0, mix.shape[1], 2)
      ]
      new = list(nodes)
      for i in range(K):
        for j in range(K):
          if kept[t, i] and kept[t, j]:
            pair = np.concatenate([u[i], u[j]])
            message = activation(pair @ matrices[0])
            if gated:
              message = message * (pair @ matrices[1])
            new[i] = new[i] + message @ up
      nodes = new
    out[t] = sum(nodes)
  return out


def drawn(dtype=jnp.float32, *, num_rounds=2, gated=True, limited=True, k=K):
  """Parameters with no zeros, outputs, a plan that drops some, both inputs."""
  r = np.random.default_rng(0)
  made = use(aggregate.dag, d_message=M, num_rounds=num_rounds, gated=gated)
  params = made.init(jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32)
  params = {n: jnp.asarray(r.normal(size=p.shape) / 2, p.dtype) for n, p in
            params.items()}  # fmt: skip
  logits = jnp.asarray(r.normal(size=(T, E)), jnp.float32)
  context = Context(valid=jnp.arange(T) != 2)
  scores = jax.nn.softmax(logits)
  routing = routers.top_k(logits, scores, scores, context=context, k=k)
  slots = use(capacity.fixed, slots=min(k, 3)) if limited else None
  plan = jmoe.assign.assign(routing, context, capacity=slots)
  kept_TK = np.asarray(plan.kept).reshape(T, k)
  y = jnp.asarray(np.where(kept_TK[..., None], r.normal(size=(T, k, D)), 0), dtype)
  x, h = (jnp.asarray(r.normal(size=(T, D)), dtype) for _ in range(2))
  return params, y, plan, x, h


def wide(tree):
  return jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)


@pytest.mark.parametrize(
  "fields, dtype",
  [
    (dict(), jnp.float32),
    (dict(), jnp.bfloat16),
    (dict(residual="outer", activation=jax.nn.sigmoid, num_rounds=1), jnp.float32),
    (dict(gated=False), jnp.float32),
    (dict(k=1), jnp.float32),
  ],
  ids=["float32", "bfloat16", "outer", "ungated", "one"],
)
def test_equals_the_definition(fields, dtype):
  shape = {n: v for n, v in fields.items() if n in ("num_rounds", "gated", "k")}
  params, y, plan, x, h = drawn(dtype, **shape)
  k = y.shape[1]
  kept = np.asarray(plan.kept).reshape(T, k)
  assert kept.any() and not kept[np.arange(T) != 2].all()
  given = {n: v for n, v in fields.items() if n != "k"}
  member = use(aggregate.dag, d_message=M, **given)
  found = jax.jit(member)(params, y, plan, x, h)
  assert found.dtype == dtype
  activation = fields.get("activation", jax.nn.silu)
  expected = by_loops(
    wide(params),
    wide(y),
    wide(plan.routing.weight).reshape(T, k),
    kept,
    wide(x if fields.get("residual") == "outer" else h),
    activation=ACTIVATIONS[activation],
    gated=fields.get("gated", True),
  )
  assert np.abs(expected).max() > 1
  # Half as precise as one sum: a value passes through two rounds.
  scale = float(np.abs(expected).max()) if dtype == jnp.bfloat16 else 1.0
  assert_close(found / scale, (expected / scale).astype(dtype))


def test_gradients_are_those_of_the_definition():
  with cases.enable_x64():
    params, y, plan, x, h = drawn(jnp.float64)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

    def total(params, y, weight, h):
      routing = dataclasses.replace(plan.routing, weight=weight)
      at = dataclasses.replace(plan, routing=routing)
      return jnp.sum(jnp.sin(aggregate.dag(params, y, at, x, h)))

    weight = plan.routing.weight.astype(jnp.float64)
    point = params, y, weight, h
    grads = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*point)
    kept = np.asarray(plan.kept).reshape(T, K)

    def value(params, y, weight, h):
      out = by_loops(
        params, y, weight.reshape(T, K), kept, h,
        activation=ACTIVATIONS[jax.nn.silu], gated=True,
      )  # fmt: skip
      return np.sin(out).sum()

    r, step = np.random.default_rng(1), 1e-5
    leaves, tree = jax.tree.flatten(wide(point))
    for i, gradient in enumerate(jax.tree.leaves(grads)):
      way = r.normal(size=leaves[i].shape)
      ends = [
        value(*tree.unflatten([*leaves[:i], leaves[i] + s * way, *leaves[i + 1 :]]))
        for s in (step, -step)
      ]
      slope = (ends[0] - ends[1]) / (2 * step)
      np.testing.assert_allclose(np.vdot(gradient, way), slope, rtol=2e-6, atol=1e-8)
    assert not np.any(np.asarray(grads[2])[~np.asarray(plan.kept)])


def test_the_order_of_choices_and_of_dropped_ones_does_not_matter():
  params, y, plan, x, h = drawn()

  def turned(array, turn):
    return array.reshape(T, K, *array.shape[1:])[:, turn].reshape(array.shape)

  turn = np.array([2, 0, 1])
  routing = dataclasses.replace(plan.routing, weight=turned(plan.routing.weight, turn))
  again = dataclasses.replace(plan, routing=routing, kept=turned(plan.kept, turn))
  assert_close(
    aggregate.dag(params, y[:, turn], again, x, h),
    aggregate.dag(params, y, plan, x, h),
  )


def layer_of(**fields) -> jmoe.MoEConfig:
  given = dict(
    router=use(routers.top_k, k=K),
    experts=use(experts.glu, d_ff=5),
    combine=use(combine.stack),
    aggregate=use(aggregate.dag, d_message=M),
    losses=(),
  )
  return jmoe.MoEConfig(D, E, **{**given, **fields})


def test_begins_as_the_layer_without_messages():
  slots = use(capacity.by_factor, factor=0.8)
  config = layer_of(dispatch=use(dispatch.einsum), capacity=slots)
  plain = dataclasses.replace(config, combine=use(combine.weighted_sum), aggregate=None)
  params = jmoe.moe_init(jax.random.key(1), config)
  x = jax.random.normal(jax.random.key(2), (2 * T, D))
  h = jax.random.normal(jax.random.key(3), (2 * T, D))
  valid = jnp.arange(2 * T) % 5 != 4
  context = Context(valid=valid)

  def total(params):
    y, _ = jmoe.moe(params, x, config, context=context, residual=h)
    return jnp.sum(jnp.sin(y)), y

  without = {n: p for n, p in params.items() if n != "aggregate"}
  sparse, info = jmoe.moe(without, x, plain, context=context)
  assert info.dropped["capacity"] > 0
  grad, y = jax.jit(jax.grad(total, has_aux=True))(params)
  assert_close(y, jnp.where(valid[:, None], h, 0) + sparse)
  # Until `up` leaves zero nothing else of the messages can learn.
  moved = {n: bool(np.any(g)) for n, g in grad["aggregate"].items()}
  assert moved == {n: n == "up_LMD" for n in moved}
  assert np.any(grad["gate"]["kernel_DE"])


def test_no_pair_is_kept_for_the_backward_pass():
  rounds, choices, width = 3, 4, 9  # so that shapes say what an array is
  member = use(aggregate.dag, d_message=width, num_rounds=rounds)
  params = member.init(jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32)
  _, y, plan, x, h = drawn(k=choices, limited=False)

  def run(params, y, h):
    return member(params, y, plan, x, h)

  pairs = {a.shape for a in arrays(jax.make_jaxpr(run)(params, y, h))}
  assert (T, choices, choices, width) in pairs  # they are made
  pull = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], params, y, h)
  saved = {a.shape for a in jax.tree.leaves(pull)}
  assert (T, choices, D) in saved
  limit = max(y.size, *(p.size for p in params.values()))
  assert all(np.prod(shape) <= limit for shape in saved), saved


def test_a_model_adds_its_skip_connection_once():
  x = jax.random.normal(jax.random.key(4), (1, T, D))
  given: dict = dict(dtype=jnp.float32, depth_scale=0.5, rngs=nnx.Rngs(0))

  block = Block(BlockConfig(Attention(num_heads=1), layer_of()), D, **given)
  y, _ = block.feed(x, Context())
  alone, _ = block.moe(normed(block.ff_norm, x), residual=x)
  np.testing.assert_array_equal(y, alone)
  outer = use(aggregate.dag, d_message=M, residual="outer")
  assert not checks.owns_skip(layer_of(aggregate=outer))


def test_costs_what_the_paper_quotes():
  config = jmoe.presets.dag_moe.layer(d_model=512, d_ff=256, num_experts=16, k=4)
  messages = jmoe.layer.param_shapes(config)["aggregate"]
  count = sum(p.size for n, p in messages.items() if n != "scale_LD")
  assert count == 393_216 == 3 * 512 * 256  # a SwiGLU shared expert of width 256
  total = cost.parameters(jmoe.presets.dag_moe.MODELS["large"]).total
  assert total == pytest.approx(699.1e6, rel=2e-4)
  plain = dataclasses.replace(config, combine=use(combine.weighted_sum), aggregate=None)
  flops = [cost.feed_forward_flops(c, 512) for c in (config, plain)]
  g = 128
  products = 4 * (2 * 512 * g + 512 * g + 2 * 4 * g * g) + 512 * g
  assert flops[0] - flops[1] == 2 * products


def test_mistakes_are_named():
  config = layer_of()
  params = jmoe.moe_init(jax.random.key(0), config)
  with pytest.raises(ValueError, match="residual=None.*pass residual"):
    jmoe.moe(params, jnp.ones((T, D)), config)
  for fields, message in (
    (dict(d_message=0), "d_message=0"),
    (dict(d_message=2, num_rounds=True), "num_rounds=True"),
    (dict(d_message=2, residual="inner"), "residual='inner'"),
  ):
    with pytest.raises((TypeError, ValueError), match=message):
      layer_of(aggregate=use(aggregate.dag, **fields))
  with pytest.raises(ValueError, match="scale='input' with aggregate=dag"):
    layer_of(scale="input")
  with pytest.raises(ValueError, match="join=blend with aggregate=dag"):
    layer_of(shared=use(experts.glu, d_ff=4), join=use(jmoe.join.blend))
  outer = layer_of(aggregate=use(aggregate.dag, d_message=2, residual="outer"))
  with pytest.raises(ValueError, match="residual is given"):
    jmoe.moe(
      jmoe.moe_init(jax.random.key(0), outer),
      jnp.ones((T, D)),
      outer,
      residual=jnp.ones((T, D)),
    )
