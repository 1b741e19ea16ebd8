"""Every expert's output, row by row, by the oracle."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import experts, kernels
from jmoe.types import Groups, Rows
from jmoe.use import use
from tests import _cases as cases, oracle
from tests.tolerance import assert_close

D, F, E = 8, 5, 6
ROWS = (3, 0, 8, 1, 2, 9)
PADDED = [-(-n // 8) * 8 for n in ROWS]
START = np.cumsum(PADDED) - PADDED
R = sum(PADDED) + 8
OWNER = np.full(R, -1)
for e, (start, rows) in enumerate(zip(START, ROWS, strict=True)):
  OWNER[start : start + rows] = e
RAGGED = Groups(jnp.asarray(START, jnp.int32), jnp.asarray(ROWS, jnp.int32), 8)
X = np.where(OWNER[:, None] >= 0, np.random.default_rng(0).normal(size=(R, D)), 0)
X = (2 * X).astype(np.float32)


@pytest.fixture(autouse=True)
def _compiled_quickly():
  with cases.quickly():
    yield


def params_of(member):
  made = jax.eval_shape(
    lambda key: member.init(key, d_model=D, num_experts=E, dtype=jnp.float32),
    jax.random.key(0),
  )
  r = np.random.default_rng(1)
  return jax.tree.map(lambda a: jnp.asarray(r.normal(size=a.shape), jnp.float32), made)


def _mlp(p, e, act=oracle.gelu):
  return oracle.mlp(
    p["up_EDF"][e], p["down_EFD"][e], act, *_biases(p, e, "up_bias_EF", "down_bias_ED")
  )


def _glu(p, e, act=oracle.silu):
  names = ("gate_bias_EF", "up_bias_EF", "down_bias_ED")
  matrices = (p[n][e] for n in ("gate_EDF", "up_EDF", "down_EFD"))
  return oracle.glu(*matrices, act, *_biases(p, e, *names))


def _biases(p, e, *names):
  return [p[n][e] if n in p else None for n in names]


def _clamped(limit=7.0, alpha=1.702):
  def made(p, e):
    return oracle.gpt_oss_glu(
      p["gate_up_EDF"][e],
      p["down_EFD"][e],
      p["gate_up_bias_EF"][e],
      p["down_bias_ED"][e],
      limit,
      alpha,
    )

  return made


def _with_free(p, e):
  if e < 2:
    return _glu(p["base"], e)
  if e < 4:
    return oracle.constant(p["mix_CD2"][e - 2], p["constant_CD"][e - 2])
  return oracle.copy if e == 4 else oracle.zero


MEMBERS = {
  "mlp": (use(experts.mlp, d_ff=F), _mlp),
  "mlp, biases": (use(experts.mlp, d_ff=F, bias=True), _mlp),
  "mlp, tanh": (
    use(experts.mlp, d_ff=F, activation=jnp.tanh, bias=True),
    lambda p, e: _mlp(p, e, np.tanh),
  ),
  "glu": (use(experts.glu, d_ff=F), _glu),
  "glu, biases": (use(experts.glu, d_ff=F, bias=True), _glu),
  "glu of gelu": (
    use(experts.glu, d_ff=F, activation=jax.nn.gelu),
    lambda p, e: _glu(p, e, oracle.gelu),
  ),
  "clamped_glu": (use(experts.clamped_glu, d_ff=F), _clamped()),
  "clamped_glu, tight": (
    use(experts.clamped_glu, d_ff=F, limit=0.5, alpha=1.0),
    _clamped(0.5, 1.0),
  ),
  "with_free": (
    use(
      experts.with_free,
      base=use(experts.glu, d_ff=F, bias=True),
      constant=2,
      copy=1,
      zero=1,
    ),
    _with_free,
  ),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_rows_go_through_their_own_expert(name):
  member, expert_of = MEMBERS[name]
  params = params_of(member)
  y = np.asarray(jax.jit(lambda p, x: member(p, Rows(x, RAGGED)))(params, X))
  host = jax.tree.map(np.asarray, params)
  for row in np.flatnonzero(OWNER >= 0):
    expected = expert_of(host, OWNER[row])(X[row].astype(np.float64))
    scale = max(1.0, np.abs(expected).max())
    assert_close(y[row] / np.float32(scale), expected / scale, f"row {row}")


@pytest.mark.parametrize("name", ["mlp, biases", "glu, biases", "clamped_glu"])
def test_any_grouped_matmul_gives_the_same_output(name):
  member, _ = MEMBERS[name]
  params, owned = params_of(member), (OWNER >= 0)[:, None]
  fused = member(params, Rows(jnp.asarray(X), RAGGED))
  for implementation in ("blocks", "ragged_dot"):
    dense = implementation == "ragged_dot"
    matmul = use(
      kernels.grouped_matmul, implementation=implementation, allow_dense=dense
    )
    y = member.replace(matmul=matmul)(params, Rows(jnp.asarray(X), RAGGED))
    scale = np.abs(np.asarray(fused)).max()
    assert_close(np.where(owned, y, 0) / scale, np.where(owned, fused, 0) / scale)


def test_clamping_stops_the_gradient_of_what_is_clamped():
  member = use(experts.clamped_glu, d_ff=1, limit=1.0)
  gate_up = jnp.zeros((1, 1, 2)).at[0, 0].set(jnp.array([1.0, 1.0]))
  params = {
    "gate_up_EDF": gate_up,
    "gate_up_bias_EF": jnp.zeros((1, 2)),
    "down_EFD": jnp.ones((1, 1, 1)),
    "down_bias_ED": jnp.zeros((1, 1)),
  }
  one = Groups(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), 1, 1)

  def y(x):
    return member(params, Rows(jnp.full((1, 1), x), one))[0, 0]

  sigmoid = oracle.sigmoid(1.702)
  assert_close(y(5.0), np.float64(2 * sigmoid))  # both are cut at 1
  assert float(jax.grad(y)(5.0)) == 0
  # Gate has no lower limit: only up is cut at -1, which makes the product zero.
  assert_close(y(-5.0), np.float64(0))


def test_free_experts_have_no_matrices():
  member, _ = MEMBERS["with_free"]
  params = params_of(member)
  assert {a.shape[0] for a in params["base"].values()} == {2}
  assert params["mix_CD2"].shape == (2, D, 2) and params["constant_CD"].shape == (2, D)
  fresh = member.init(jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32)
  assert not np.any(fresh["constant_CD"])
  plain = member.replace(constant=0, copy=3)
  made = plain.init(jax.random.key(0), d_model=D, num_experts=E, dtype=jnp.float32)
  assert set(made) == {"base"}


def test_free_experts_pass_their_gradient_to_their_own_rows():
  member, _ = MEMBERS["with_free"]
  params = params_of(member)

  def total(x):
    y = member(params, Rows(x, RAGGED))
    return jnp.sum(jnp.where((OWNER >= 0)[:, None], y, 0))

  slope = np.asarray(jax.grad(total)(jnp.asarray(X)))
  np.testing.assert_array_equal(slope[OWNER == 4], np.ones((ROWS[4], D)))  # a copy
  assert not np.any(slope[OWNER == 5])  # a zero
  assert np.all(np.any(slope[OWNER == 3], axis=1))  # a constant


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_compute_in_the_rows_dtype(dtype):
  for name in ("glu, biases", "clamped_glu", "with_free"):
    member, _ = MEMBERS[name]
    params = jax.tree.map(lambda a: a / 4, params_of(member))
    narrow = member(params, Rows(jnp.asarray(X, dtype) / 4, RAGGED))
    assert narrow.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("d_ff", [0, -1, 2.0, True])
def test_an_impossible_width_is_refused(d_ff):
  for member in (experts.mlp, experts.glu, experts.clamped_glu):
    with pytest.raises(ValueError, match=f"d_ff={d_ff!r}"):
      member.check(None, d_ff=d_ff)


@pytest.mark.parametrize("free", [dict(), dict(copy=6), dict(constant=-1, copy=2)])
def test_free_experts_must_leave_one_that_is_not(free):
  base = use(experts.mlp, d_ff=F)

  class Config:
    num_experts = E

  with pytest.raises(ValueError, match="leave at least 1"):
    experts.with_free.check(Config, base=base, **free)
