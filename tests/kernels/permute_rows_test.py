"""Rows in another order: Triton's kernels, interpreted, against plain jax."""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import capacity, routers
from jmoe.assign import assign
from jmoe.dispatch.layout import equal, ragged
from jmoe.kernels import devices, permute_rows
from jmoe.kernels.permute_rows import reference
from jmoe.types import Context
from jmoe.use import use
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")


def operands(num=50, cols=200, rows=70, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  index = jax.random.randint(keys[1], (rows,), 0, num + 1)  # `num` is no row
  return (
    jax.random.normal(keys[0], (num, cols), dtype),
    index.at[0].set(num),
    jax.random.normal(keys[2], (rows,)),
    jax.random.normal(keys[3], (rows, cols), dtype),
  )


@pytest.mark.parametrize("cols", [128, 200, 1024, 1500])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_interpreted_rows_are_those_of_plain_jax(cols, dtype):
  from jmoe.kernels.permute_rows import triton

  x, index, weight, other = operands(cols=cols, dtype=dtype)
  np.testing.assert_array_equal(
    triton.take(x, index, interpret=True), reference.take(x, index)
  )
  poisoned = jnp.where((index < len(x))[:, None], other, jnp.nan)
  found = triton.weighed(x, index, weight, poisoned, interpret=True)
  expected = reference.weighed(x, index, weight, other)
  there = np.asarray(index) < len(x)
  assert_close(found[0], expected[0])
  assert_close(found[1][there], expected[1][there])
  assert found[0].dtype == dtype and not np.asarray(found[0])[~there].any()


def layout_of(T=40, E=5, k=3, limited=False, seed=0):
  """Where the tokens of a random routing go, some of them to fewer experts than k."""
  logits = jax.random.normal(jax.random.key(seed), (T, E))
  context = Context(valid=jnp.arange(T) % 7 != 3)
  routing = routers.top_k(logits, logits, logits, k=k, context=context)
  slots = use(capacity.fixed, slots=k * T // E) if limited else None
  plan = assign(routing, context, capacity=slots)
  return equal(plan, alignment=8) if limited else ragged(plan)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("cols", [128, 1500])
def test_interpreted_tokens_go_to_each_of_their_places(cols, limited):
  from jmoe.kernels.permute_rows import triton

  layout = layout_of(limited=limited)
  x = jax.random.normal(jax.random.key(0), (layout.num_tokens, cols), jnp.bfloat16)
  row_TK = layout.row.reshape(layout.num_tokens, layout.k)
  assert (row_TK == layout.num_rows).any() and (layout.token == len(x)).any()
  found = triton.spread(x, row_TK, layout.token, interpret=True)
  np.testing.assert_array_equal(found, reference.take(x, layout.token))


def read_rows(layout, block):
  """bool[R] of the blocks in which an expert has rows."""
  read = np.zeros(layout.num_rows, bool)
  for first, rows in zip(*map(np.asarray, (layout.groups.start, layout.groups.rows))):
    for row in range(first, first + rows):
      read[row // block * block : (row // block + 1) * block] = True
  return read


@pytest.mark.parametrize("limited", [False, True])
def test_rows_of_blocks_that_nobody_reads_are_left_as_they_are(limited, monkeypatch):
  from jmoe.kernels.permute_rows import triton

  interpreted = functools.partial(triton.spread, interpret=True)
  monkeypatch.setattr(triton, "spread", interpreted)
  layout = layout_of(E=7, limited=limited)
  x = jax.random.normal(jax.random.key(0), (layout.num_tokens, 128), jnp.bfloat16)
  with devices.as_if("hopper"):
    found = np.asarray(permute_rows.spread(x, layout, block=8), np.float32)
  read = read_rows(layout, 8)
  padding = np.asarray(layout.token) == layout.num_tokens
  assert (read & padding).any() and not read.all() and padding[~read].all()
  np.testing.assert_array_equal(found[read], reference.take(x, layout.token)[read])
  assert np.isnan(found[~read]).all()  # as a buffer is that nobody wrote into


def test_interpreted_rows_can_be_batched():
  from jmoe.kernels.permute_rows import triton

  x, index, *_ = operands()
  found = jax.vmap(lambda x, i: triton.take(x, i, interpret=True))(
    jnp.stack([x, x + 1]), jnp.stack([index, index[::-1]])
  )
  np.testing.assert_array_equal(found[1], reference.take(x + 1, index[::-1]))


@pytest.mark.parametrize("models", [None, 3])
def test_an_array_of_anything_has_the_width_and_dtype_of_the_rows(models):
  from jmoe.kernels.permute_rows import triton

  def made(rows):
    return triton.unwritten(rows, 7, interpret=True)

  rows = jnp.ones((3, 5, 130) if models else (5, 130), jnp.bfloat16)
  found = jax.vmap(made)(rows) if models else made(rows)
  assert found.dtype == jnp.bfloat16
  assert found.shape == ((3, 7, 130) if models else (7, 130))
  assert permute_rows.unwritten(jnp.ones((5, 4)), 7).shape == (7, 4)  # not a GPU's


@pytest.mark.accelerator
@pytest.mark.parametrize("cols", [4, 128, 1500])
def test_an_array_of_anything_on_a_gpu_is_written_into(cols):
  rows = jax.random.normal(jax.random.key(0), (50, cols), jnp.bfloat16)

  @jax.jit
  def twice(rows):
    found = permute_rows.unwritten(rows, 100)
    for first in (0, 50):
      found = jax.lax.dynamic_update_slice_in_dim(found, rows + first, first, 0)
    return found

  np.testing.assert_array_equal(twice(rows), jnp.concatenate([rows, rows + 50]))


@pytest.mark.accelerator
@pytest.mark.parametrize("limited", [False, True])
def test_tokens_on_a_gpu_go_to_each_of_their_places(limited):
  layout = layout_of(T=1000, E=37, k=8, limited=limited)
  x = jax.random.normal(jax.random.key(0), (1000, 1500), jnp.bfloat16)
  expected = reference.take(x, layout.token)
  np.testing.assert_array_equal(jax.jit(permute_rows.spread)(x, layout), expected)
  read = read_rows(layout, 8)
  found = jax.jit(functools.partial(permute_rows.spread, block=8))(x, layout)
  np.testing.assert_array_equal(found[read], expected[read])


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("cols", [128, 1500, 2048])
def test_rows_on_a_gpu_are_those_of_plain_jax(cols, dtype):
  x, index, weight, other = operands(1000, cols, 3000, dtype)
  np.testing.assert_array_equal(
    jax.jit(permute_rows.take)(x, index), reference.take(x, index)
  )
  found = jax.jit(permute_rows.weighed)(x, index, weight, other)
  expected = reference.weighed(x, index, weight, other)
  there = np.asarray(index) < len(x)
  assert_close(found[0], expected[0])
  np.testing.assert_allclose(
    found[1][there], expected[1][there], rtol=1e-3, atol=1e-3 * cols**0.5
  )
