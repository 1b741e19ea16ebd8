"""jax's megablox kernels as jmoe's grouped matmul of TPUs, interpreted on a CPU."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.kernels import devices, grouped_matmul
from jmoe.kernels.grouped_matmul import choose, megablox as kernels, reference
from jmoe.kernels.grouped_matmul.reference import expert_of_rows
from jmoe.types import Groups
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

TILE = devices.TPU_TILE
OLD = jax.__version_info__ < (0, 12)

D, F, R = 24, 40, 7 * TILE
LOADS = {
  "experts without rows": (130, 0, 5, 0, 0),
  "the first and the last have none": (0, 128, 1, 200, 0),
  "nothing": (0, 0, 0, 0, 0),
  "whole tiles": (128, 128, 128, 0, 128),
}


def groups_of(loads) -> Groups:
  rows = np.asarray(loads, np.int32)
  padded = -(-rows // TILE) * TILE
  start = jnp.asarray(np.cumsum(padded) - padded, jnp.int32)
  return Groups(start, jnp.asarray(rows), TILE)


def operands(loads, dtype):
  """Groups, x, w, b and dy; padding is zero, and what comes after it not a number."""
  groups, E = groups_of(LOADS[loads]), len(LOADS[loads])
  keys = jax.random.split(jax.random.key(1), 4)
  real = (expert_of_rows(groups, R) >= 0)[:, None]
  used = jnp.sum(-(-groups.rows // TILE) * TILE)
  tail = (jnp.arange(R) >= used)[:, None]
  x, dy = (
    jnp.where(tail, jnp.nan, jnp.where(real, jax.random.normal(k, (R, n), dtype), 0))
    for k, n in ((keys[0], D), (keys[1], F))
  )
  w = jax.random.normal(keys[2], (E, D, F), dtype) / D**0.5
  return groups, x, w, jax.random.normal(keys[3], (E, F), dtype), dy


def both(function, groups, x, w, b, dy):
  """Values of rows that somebody owns, and gradients."""
  real = (expert_of_rows(groups, x.shape[0]) >= 0)[:, None]
  y, pull = jax.vjp(lambda x, w, b: function(x, w, groups, b), x, w, b)
  dx, dw, db = pull(dy)
  return jnp.where(real, y, 0), jnp.where(real, dx, 0), dw, db


@functools.cache
def compiled(function):
  return jax.jit(functools.partial(both, function))


@pytest.fixture(autouse=True)
def _tpu():
  with devices.as_if("tpu"), kernels.interpreted():
    yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loads", LOADS)
def test_equals_the_reference_forward_and_backward(loads, dtype):
  groups, x, w, b, dy = operands(loads, dtype)
  found = compiled(grouped_matmul)(groups, x, w, b, dy)
  wide = [jnp.nan_to_num(a.astype(jnp.float32)) for a in (x, w, b, dy)]
  expected = compiled(reference)(groups, *wide)
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == dtype
    scale = max(1.0, float(jnp.abs(other).max()))  # sums of products, not entries
    assert_close(one / jnp.asarray(scale, one.dtype), other / scale)


def test_a_result_can_be_wider_than_the_operands():
  groups, x, w, b, _ = operands("experts without rows", jnp.bfloat16)
  x = jnp.nan_to_num(x)
  found = kernels.megablox(x, w, groups, b, jnp.float32)
  x_wide, w_wide, b_wide = (a.astype(jnp.float32) for a in (x, w, b))
  expected = reference(x_wide, w_wide, groups, b_wide)
  real = (expert_of_rows(groups, x.shape[0]) >= 0)[:, None]
  np.testing.assert_allclose(
    jnp.where(real, found, 0), jnp.where(real, expected, 0), rtol=1e-5, atol=1e-5
  )


def test_models_that_share_a_program_take_turns():
  groups, x, w, b, dy = operands("whole tiles", jnp.float32)
  two = [jnp.stack([a, 2 * a]) for a in (x, w, b, dy)]
  found = jax.jit(jax.vmap(functools.partial(both, grouped_matmul, groups)))(*two)
  for n in range(2):
    alone = compiled(grouped_matmul)(groups, *(a[n] for a in two))
    for one, other in zip(found, alone, strict=True):
      np.testing.assert_array_equal(one[n], other)


def test_a_layer_gives_what_it_gives_on_a_cpu():
  config = jmoe.simple(16, 24, num_experts=3, k=2)
  params = jmoe.moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (80, 16))

  def loss(params, x):
    return jnp.sum(jnp.sin(jmoe.moe(params, x, config)[0]))

  found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  with devices.as_if("cpu"):
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    scale = max(1.0, float(jnp.abs(other).max()))
    assert_close(one / scale, other / scale)


def test_ragged_dot_goes_the_same_way():
  keys = jax.random.split(jax.random.key(0), 2)
  lhs = jax.random.normal(keys[0], (140, 12), jnp.bfloat16)
  rhs = jax.random.normal(keys[1], (3, 12, 20), jnp.bfloat16)
  sizes = jnp.array([130, 0, 7], jnp.int32)

  def run(function, lhs, rhs):
    y, pull = jax.vjp(function, lhs, rhs)
    return y, *pull(jnp.ones_like(y))

  def ours(lhs, rhs):
    return jmoe.ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)

  text = str(jax.make_jaxpr(ours)(lhs, rhs))
  assert "pallas_call" in text and "ragged_dot" not in text
  found = jax.jit(functools.partial(run, ours))(lhs, rhs)
  wide = [a.astype(jnp.float32) for a in (lhs, rhs)]
  expected = run(lambda a, b: jax.lax.ragged_dot(a, b, sizes), *wide)
  assert found[0].dtype == jnp.float32
  for one, other in zip(found, expected, strict=True):
    scale = max(1.0, float(jnp.abs(other).max()))
    assert_close(
      (one / jnp.asarray(scale, one.dtype)).astype(jnp.bfloat16), other / scale
    )


FALLBACK = "blocks" if OLD else "ragged_dot"


@pytest.mark.parametrize(
  ("dtype", "block", "varies", "name", "said"),
  [
    ("bfloat16", 128, False, "megablox", "only tiles that hold rows"),
    ("float32", 512, False, "megablox", "only tiles that hold rows"),
    ("float16", 128, False, FALLBACK, "megablox has no float16"),
    ("bfloat16", 64, False, FALLBACK, "aligned to 64 rows, not to 128"),
    ("bfloat16", 128, True, FALLBACK, "shard_map"),
  ],
)
def test_the_choice_and_its_reason(dtype, block, varies, name, said):
  groups = Groups(None, None, block)
  found, why, slow = choose("tpu", groups, 5, dtype, varies=varies)
  assert found == name and said in why
  assert slow == (name == "blocks")
  assert choose("tpu", Groups(None, None, block, 256), 5, dtype)[0] == "batched"


def test_what_does_not_fit_is_refused_by_name():
  groups, x, w, _, _ = operands("whole tiles", jnp.float16)
  with pytest.raises(ValueError, match="'megablox' cannot serve, megablox has no"):
    grouped_matmul(x, w, groups, implementation="megablox")
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  with devices.as_if("cpu"), pytest.raises(ValueError, match="this is no TPU"):
    grouped_matmul(x, w, groups, implementation="megablox")


def test_explain_names_it_and_what_else_serves():
  config = jmoe.simple(16, 32, num_experts=4, k=2)
  told = jmoe.explain(config, 64, device="tpu", dtype="bfloat16")
  assert "matmul: megablox (Pallas, only tiles that hold rows)" in told
  told = jmoe.explain(config, 64, device="tpu", dtype="float16")
  assert f"matmul: {FALLBACK} (" in told and "megablox has no float16" in told


@pytest.mark.parametrize(("mean", "tile"), [(5, 128), (2048, 128), (4096, 256)])
def test_tiles_grow_with_the_rows_of_an_expert(mean, tile):
  assert devices.row_alignment(jnp.bfloat16, mean) == tile
  assert devices.row_alignment(jnp.bfloat16) == 1  # of equal groups
  with devices.as_if("cpu"):
    assert devices.row_alignment(jnp.bfloat16, mean) == 1


@pytest.mark.parametrize("size", [8, 72, 128, 768, 2048, 7168, 14336, 5000, 100_003])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tiles_cover_a_matrix_and_fit_the_chip(size, dtype):
  for block in (128, 512):
    found = (
      kernels.rows_tile(8192, size, 1024, 8, block, dtype),
      kernels.rows_tile(8192, 1024, size, 8, block, dtype),
      kernels.matrices_tile(8192, size, 1024, block, dtype),
    )
    for rows, *widths in found:
      assert rows == block
      for width, whole in zip(widths, (size, 1024), strict=False):
        assert width % 128 == 0 or width in (size, 1024), (width, whole)
      if size % 128 == 0:
        assert all(w in (size, 1024) or size % w == 0 or 1024 % w == 0 for w in widths)
      bytes_of = jnp.dtype(dtype).itemsize
      assert 2 * bytes_of * widths[0] * widths[1] < 16 * 2**20
