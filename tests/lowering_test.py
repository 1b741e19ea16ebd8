"""What the compiler is given: products of the router, scatters, sizes of arrays.

Read from jaxprs and from text lowered for accelerators, since no number computed on a
CPU can tell.  Sizes are chosen so that a shape says what an array is.
"""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import (
  Context,
  aggregate,
  balance,
  combine,
  dispatch,
  experts,
  gates,
  join,
  layer,
  losses,
  noise,
  restrict,
  routers,
  score,
  use,
)
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import MoEConfig
from tests.jaxprs import arrays, primitives, products, scatters

T, D, F, E, K, ROWS = 66, 20, 44, 6, 2, 3
LOSSES = (
  use(losses.load_balance),
  use(losses.load_balance, over="sequence"),
  use(losses.router_z),
  use(losses.importance),
  use(losses.entropy_local),
  use(losses.entropy_global),
)
NOISY = dict(logit_noise=use(noise.gaussian), losses=(*LOSSES, use(losses.load)))
CAPACITY = dict(
  capacity=use(capacity.by_factor, factor=1.0), dispatch=use(dispatch.buckets)
)
ONE_HOT = dict(CAPACITY, dispatch=use(dispatch.einsum))
DROPLESS = dict(capacity=None, dispatch=use(dispatch.sort))


def sparse(**fields) -> MoEConfig:
  """Token choice with every loss that needs no noise, dropless unless it is said."""
  config = dict(
    experts=use(experts.glu, d_ff=F), router=use(routers.top_k, k=K), losses=LOSSES
  )
  return MoEConfig(D, E, **{**config, **fields})


def soft(**fields) -> MoEConfig:
  return sparse(
    gate=use(gates.slots, slots_per_expert=4),
    router=use(routers.soft),
    dispatch=use(dispatch.mix),
    losses=(),
    **fields,
  )


def arguments(config, dtype=jnp.float32, valid=True):
  """Parameters and x as shapes, and keyword arguments that satisfy every stage."""
  params = layer.param_shapes(config)
  x_TD = jax.ShapeDtypeStruct((T, D), dtype)
  ids = np.arange(T, dtype=np.int32)
  context = Context(
    valid=ids < T - 5 if valid else None,
    row=None if config.group_size == "row" or config.k is None else ids * ROWS // T,
    position=ids,
    token_id=ids % 7,
    domain_id=ids % 2,
    modality=ids % 2,
    table=ids[:7] % E,
    num_rows=ROWS,
  )
  bias = np.zeros(E, np.float32) if config.balance is not None else None
  heard = {}
  if config.gate.kwargs.get("residual"):
    heard["previous_logits"] = np.zeros((T, E), np.float32)
  return (params, x_TD), dict(
    context=context,
    state=jmoe.State(bias=bias),
    key=jax.random.key(0),
    train=True,
    **heard,
  )


def program(config, dtype=jnp.float32):
  """A function with the gradient of everything by parameters and x, and its inputs."""
  inputs, keywords = arguments(config, dtype)

  def loss_fn(params, x_TD):
    y, info = layer.moe(params, x_TD, config, **keywords)
    total = jnp.sum(y.astype(np.promote_types(np.float32, y.dtype)) ** 2)
    auxiliary = [loss.astype(total.dtype) for loss in info.losses.values()]
    return sum(auxiliary, total), (y, info)

  return jax.grad(loss_fn, (0, 1), has_aux=True), inputs


def jaxpr_of(config, dtype=jnp.float32):
  function, inputs = program(config, dtype)
  return jax.make_jaxpr(function)(*inputs)


# -- the readers read ------------------------------------------------------------------


def hidden_scatter(x_TD):
  """A scatter in the gradient of a gather, in loops, in a custom derivative."""

  @jax.custom_vjp
  def read(x_TD):
    return x_TD * 2

  def backward(_, grad_TD):
    def body(i, total_TD):
      def inner(total_TD, _):
        step = jax.jit(lambda a: a.at[jnp.array([0, 0])].add(grad_TD[:2]))
        return jax.lax.cond(i > 0, step, lambda a: a, total_TD), None

      return jax.lax.scan(inner, total_TD, length=2)[0]

    return (jax.lax.fori_loop(0, jnp.int32(2) + i32(grad_TD), body, grad_TD),)

  read.defvjp(lambda x_TD: (read(x_TD), None), backward)
  return jnp.sum(jax.checkpoint(read)(x_TD))


def i32(array):
  return jnp.sum(array).astype(jnp.int32)


def test_a_hidden_scatter_is_found():
  x_TD = jax.ShapeDtypeStruct((4, 3), jnp.float32)
  found = scatters(jax.make_jaxpr(jax.grad(hidden_scatter))(x_TD))
  assert found and "scatter" in found[0]
  gather = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[jnp.array([0, 0])])))(x_TD)
  assert scatters(gather)
  update = jax.make_jaxpr(
    lambda x, i: jax.lax.dynamic_update_slice_in_dim(x, x[:1], i, 0)
  )(x_TD, 1)
  assert not scatters(update) and "dynamic_update_slice" in primitives(update)


def test_products_are_read_from_lowered_text():
  def function(a, b, c):
    wide = b.astype(jnp.float32)
    return jnp.dot(a, wide, precision=jax.lax.Precision.HIGHEST), jnp.dot(b, c)

  inputs = [
    jax.ShapeDtypeStruct((4, 5), jnp.float32),
    jax.ShapeDtypeStruct((5, 6), jnp.bfloat16),
    jax.ShapeDtypeStruct((6, 7), jnp.bfloat16),
  ]
  exact, fast = products(lowered(function, inputs, "tpu"))
  assert exact[:3] == ((4, 5), (5, 6), (4, 6)) and exact.dtypes == ("f32", "f32")
  assert exact.precision == ("HIGHEST", "HIGHEST")
  assert fast.out == (5, 7) and fast.dtypes == ("bf16", "bf16")
  assert fast.precision == ("DEFAULT", "DEFAULT")


def lowered(function, inputs, platform: str) -> str:
  traced = jax.jit(function).trace(*inputs)
  return traced.lower(lowering_platforms=(platform,)).as_text()


# -- router arithmetic -----------------------------------------------------------------

GATES = {
  "linear": sparse(gate=use(gates.linear, bias=True)),
  "cosine": sparse(gate=use(gates.cosine, d_project=10)),
  "mlp": sparse(gate=use(gates.mlp, d_hidden=10, residual=True)),
  "per_modality": sparse(gate=use(gates.per_modality, num_modalities=2)),
  "capacity": sparse(**CAPACITY, **NOISY, shared=use(experts.mlp, d_ff=F)),
  "einsum": sparse(**ONE_HOT),
  "gated shared": sparse(
    shared=use(experts.glu, d_ff=F, bias=True), join=use(join.blend)
  ),
  "soft": soft(),
}


@pytest.fixture
def on(monkeypatch):
  """Traces as if a device were there: implementations are chosen by backend."""

  def choose(platform):
    backend = "gpu" if platform == "cuda" else platform
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

  return choose


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", GATES)
def test_router_products_are_exact_and_those_of_experts_fast(name, platform, on):
  on(platform)
  function, inputs = program(GATES[name], jnp.bfloat16)
  text = lowered(function, inputs, platform)
  found = products(text)
  routing = [p for p in found if F not in {*p.left, *p.right, *p.out}]
  expert = [p for p in found if p not in routing]
  inside = text.count("@tpu_custom_call")  # products that kernels make
  # Forward and both gradients.
  assert len(routing) >= 3 and len(expert) + inside >= 6
  # A mask and rows of bfloat16, by parts that are exact there: `mask_product`.
  narrow = name == "einsum" and platform == "tpu"
  parts = [p for p in routing if narrow and len(p.left + p.right) > 6]
  assert len(parts) == (7 if narrow else 0)
  for product in set(routing) - set(parts):
    assert product.precision == ("HIGHEST", "HIGHEST"), product
    assert product.dtypes == ("f32", "f32"), product
  for product in expert + parts:
    assert product.precision == ("DEFAULT", "DEFAULT"), product
    assert product.dtypes == ("bf16", "bf16"), product


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_gate_and_both_its_gradients_are_among_them(platform, on):
  on(platform)
  function, inputs = program(GATES["linear"], jnp.bfloat16)
  exact = {
    frozenset(p.out)
    for p in products(lowered(function, inputs, platform))
    if p.precision == ("HIGHEST", "HIGHEST") and p.dtypes == ("f32", "f32")
  }
  assert {frozenset((T, E)), frozenset((D, E)), frozenset((T, D))} <= exact


def test_a_gate_in_wider_floats_stays_there():
  jax.config.update("jax_enable_x64", True)
  try:
    text = lowered(*program(GATES["linear"], jnp.float64), "tpu")
  finally:
    jax.config.update("jax_enable_x64", False)
  gate = [p for p in products(text) if F not in {*p.left, *p.right, *p.out}]
  assert any(p.dtypes == ("f64", "f64") for p in gate)


# -- no scatters -----------------------------------------------------------------------

RESTRICT = (
  use(restrict.expert_groups, num_groups=3, keep=2),
  use(restrict.domain, num_domains=2),
)
NO_SCATTER = {
  "plain": {},
  "no losses": dict(losses=()),
  "biases": dict(
    gate=use(gates.linear, bias=True), experts=use(experts.mlp, d_ff=F, bias=True)
  ),
  "clamped": dict(experts=use(experts.clamped_glu, d_ff=F)),
  "free": dict(
    experts=use(
      experts.with_free, base=use(experts.glu, d_ff=F), constant=1, copy=1, zero=1
    )
  ),
  "balance": dict(score=use(score.sigmoid), balance=use(balance.update)),
  "before": dict(renormalise=use(renormalise.before_dropping)),
  "after": dict(renormalise=use(renormalise.after_dropping)),
  "chosen": dict(renormalise=use(renormalise.over_chosen), **NOISY),
  "restrict": dict(restrict=RESTRICT, router=use(routers.top_k, k=1)),
  "rescore": dict(
    restrict=(use(restrict.subset, experts=(0, 1, 4)),),
    rescore=True,
    renormalise=use(renormalise.before_dropping),
  ),
  "top_2": dict(router=use(routers.top_2), select_noise=use(noise.gumbel)),
  "noisy": dict(router=use(routers.noisy_top_k, k=2), input_noise=use(noise.jitter)),
  "hashed": dict(router=use(routers.hashed, vocab_size=7)),
  "every": dict(router=use(routers.every_expert)),
  "modality": dict(gate=use(gates.per_modality, num_modalities=2)),
  "cosine": dict(gate=use(gates.cosine, d_project=10)),
  "residual": dict(gate=use(gates.mlp, residual=True)),
  "input": dict(scale="input"),
  "stack": dict(
    combine=use(combine.stack), aggregate=use(aggregate.per_task, num_tasks=2)
  ),
  "shared": dict(shared=use(experts.glu, d_ff=F), join=use(join.sigmoid_gate)),
}
ONLY_BUCKETS = {
  "groups": dict(group_size=22),
  "rows": dict(group_size="row"),
  "confidence": dict(priority=use(priority.by_confidence)),
  "weight": dict(priority=use(priority.by_weight)),
  "random": dict(priority=use(priority.random)),
  "per expert": dict(
    capacity=use(capacity.by_factor, factor=1.0, per_expert=(1.0,) * 5 + (2.0,))
  ),
}
CASES = {f"sort {name}": {**DROPLESS, **f} for name, f in NO_SCATTER.items()}
CASES |= {f"buckets {name}": {**CAPACITY, **f} for name, f in NO_SCATTER.items()}
CASES |= {
  "sort bounded": dict(DROPLESS, max_rows=0.5),
  "sort aligned": dict(dispatch=use(dispatch.sort, block=16)),
}
CASES |= {f"buckets {name}": {**CAPACITY, **f} for name, f in ONLY_BUCKETS.items()}


@pytest.mark.parametrize("name", CASES)
def test_token_choice_scatters_nowhere(name):
  assert not scatters(jaxpr_of(sparse(**CASES[name])))


def test_expert_choice_does_scatter_so_the_test_above_says_something():
  config = sparse(
    router=use(routers.expert_choice), dispatch=use(dispatch.buckets), losses=()
  )
  assert scatters(jaxpr_of(config))


# -- sizes -----------------------------------------------------------------------------

SLOTS = 24  # of factor 1: k * T / E, up to a multiple of 8
WIDE = 8  # so narrow that T*E*C is larger than anything a layer needs


def sized(**fields) -> MoEConfig:
  own = dict(experts=use(experts.glu, d_ff=WIDE), losses=LOSSES)
  return MoEConfig(WIDE, E, **{**own, **fields})


def largest(config) -> int:
  """Entries of the largest array in the gradient's program."""
  ids = np.arange(T, dtype=np.int32)
  context = Context(valid=ids < T - 5, num_rows=ROWS)
  x_TD = jax.ShapeDtypeStruct((T, WIDE), jnp.float32)

  def loss_fn(params, x_TD):
    y, info = layer.moe(params, x_TD, config, context=context, key=None)
    return sum(info.losses.values(), jnp.sum(y * y))

  jaxpr = jax.make_jaxpr(jax.grad(loss_fn, (0, 1)))(layer.param_shapes(config), x_TD)
  return max(int(np.prod(a.shape)) for a in arrays(jaxpr))


SLOTTED = use(capacity.fixed, slots=SLOTS)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    dict(capacity=SLOTTED, dispatch=use(dispatch.buckets)),
    dict(
      capacity=SLOTTED, dispatch=use(dispatch.buckets), priority=use(priority.by_weight)
    ),
    dict(router=use(routers.expert_choice), dispatch=use(dispatch.buckets), losses=()),
  ],
  ids=["sort", "buckets", "priority", "expert choice"],
)
def test_no_array_is_as_large_as_tokens_times_experts_times_slots(fields):
  assert largest(sized(**fields)) < T * E * SLOTS


@pytest.mark.parametrize(
  "config",
  [
    sized(capacity=SLOTTED, dispatch=use(dispatch.einsum)),
    sized(
      gate=use(gates.slots, slots_per_expert=SLOTS * ROWS),
      router=use(routers.soft),
      dispatch=use(dispatch.mix),
      losses=(),
    ),
  ],
  ids=["einsum", "mix"],
)
def test_the_one_hot_products_do_have_such_arrays(config):
  assert largest(config) >= T * E * SLOTS


def floats(config) -> set[tuple[int, ...]]:
  return {
    a.shape for a in arrays(jaxpr_of(config)) if jnp.issubdtype(a.dtype, jnp.floating)
  }


@pytest.mark.parametrize("fields", [DROPLESS, CAPACITY], ids=["sort", "buckets"])
def test_a_weighted_sum_never_holds_every_choice_of_every_token(fields):
  every = {(T, K, D), (K, T, D), (T * K, D)}
  assert not every & floats(sparse(**fields))
  stacked = dict(
    combine=use(combine.stack), aggregate=use(aggregate.per_task, num_tasks=2)
  )
  assert every & floats(sparse(**fields, **stacked))
