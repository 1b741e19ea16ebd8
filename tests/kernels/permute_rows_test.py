"""Rows in another order: Triton's kernels, interpreted, against plain jax."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels import permute_rows
from jmoe.kernels.permute_rows import reference
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
  scaled = triton.scaled(x, index, weight, interpret=True)
  assert scaled.dtype == dtype and not np.asarray(scaled)[~there].any()
  assert_close(scaled, expected[0])
  assert_close(reference.scaled(x, index, weight), expected[0])
  assert found[0].dtype == dtype and not np.asarray(found[0])[~there].any()


def test_interpreted_rows_can_be_batched():
  from jmoe.kernels.permute_rows import triton

  x, index, *_ = operands()
  found = jax.vmap(lambda x, i: triton.take(x, i, interpret=True))(
    jnp.stack([x, x + 1]), jnp.stack([index, index[::-1]])
  )
  np.testing.assert_array_equal(found[1], reference.take(x + 1, index[::-1]))


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
  assert_close(jax.jit(permute_rows.scaled)(x, index, weight), expected[0])
