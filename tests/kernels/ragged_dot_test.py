"""jmoe.ragged_dot is jax.lax.ragged_dot: values, gradients, transformations, errors."""
# SPDX-License-Identifier: Apache-2.0

import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jmoe
from tests.kernels.hopper_test import interpreted, on_cpu
from tests.tolerance import assert_close

SIZES = {
  "mixed": (5, 0, 17, 8, 3),
  "one group": (0, 0, 33, 0, 0),
  "none": (0, 0, 0, 0, 0),
  "rows left over": (3, 1, 0, 0, 9),
}


def operands(sizes, m=33, k=6, n=10, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  lhs = jax.random.normal(keys[0], (m, k), dtype)
  rhs = jax.random.normal(keys[1], (len(sizes), k, n), dtype)
  return lhs, rhs, jnp.asarray(sizes, jnp.int32), jax.random.normal(keys[2], (m, n))


def both(function, lhs, rhs, sizes, dy):
  """The product and its gradients; rows past the last group have no cotangent."""
  real = (jnp.arange(len(lhs)) < jnp.sum(sizes))[:, None]
  y, pull = jax.vjp(lambda a, b: function(a, b, sizes), lhs, rhs)
  return jnp.where(real, y, 0), *pull(jnp.where(real, dy, 0).astype(y.dtype))


@pytest.mark.contract
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_those_of_jax(name, dtype):
  args = operands(SIZES[name], dtype=dtype)
  found = jax.jit(lambda *a: both(jmoe.ragged_dot, *a))(*args)
  wide = [a.astype(jnp.float32) for a in args[:2]]
  expected = both(jax.lax.ragged_dot, *wide, *args[2:])
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == dtype
    assert_close(one, other)
  rest = jmoe.ragged_dot(*args[:3])[int(sum(SIZES[name])) :]
  assert not np.asarray(rest, np.float32).any()


@hypothesis.given(
  sizes=st.lists(st.integers(0, 90), min_size=1, max_size=7),
  rest=st.integers(0, 5),
)
def test_any_sizes_give_what_a_loop_gives(sizes, rest):
  m = max(1, sum(sizes) + rest)
  lhs, rhs, group_sizes, _ = operands(sizes, m=m)
  expected = np.zeros((m, rhs.shape[2]), np.float32)
  begin = 0
  for g, size in enumerate(sizes):
    expected[begin : begin + size] = lhs[begin : begin + size] @ rhs[g]
    begin += size
  assert_close(jmoe.ragged_dot(lhs, rhs, group_sizes), expected)


def test_a_wider_result_is_not_rounded_on_the_way():
  lhs, rhs, sizes, _ = operands(SIZES["mixed"], k=64, dtype=jnp.bfloat16)
  found = jmoe.ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)
  expected = jax.lax.ragged_dot(lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_numpy_arrays_are_taken_too():
  lhs, rhs, sizes, _ = operands(SIZES["mixed"])
  found = jmoe.ragged_dot(np.asarray(lhs), np.asarray(rhs), np.asarray(sizes))
  np.testing.assert_array_equal(found, jmoe.ragged_dot(lhs, rhs, sizes))


def test_it_can_be_batched_scanned_and_recomputed():
  lhs, rhs, sizes, _ = operands(SIZES["mixed"])
  many = jnp.stack([sizes, sizes[::-1]])
  found = jax.vmap(jmoe.ragged_dot, in_axes=(None, None, 0))(lhs, rhs, many)
  for n in range(2):
    assert_close(found[n], jmoe.ragged_dot(lhs, rhs, many[n]))

  def layer(x, w):
    return jnp.tanh(jmoe.ragged_dot(x, w, sizes)), None

  square = jax.random.normal(jax.random.key(5), (3, 5, 6, 6)) / 3
  deep = lambda w: jnp.sum(jax.lax.scan(jax.checkpoint(layer), lhs, w)[0])  # noqa: E731
  flat = lambda w: jnp.sum(  # noqa: E731
    layer(layer(layer(lhs, w[0])[0], w[1])[0], w[2])[0]
  )
  assert_close(jax.grad(deep)(square), jax.grad(flat)(square))


def test_it_runs_inside_shard_map():
  lhs, rhs, sizes, _ = operands(SIZES["mixed"])
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("expert",), axis_types=auto)
  many = jnp.stack([lhs + n for n in range(8)])

  def body(x, w, s):
    return jmoe.ragged_dot(x[0], w, s)[None]

  split = jax.shard_map(
    body, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert")
  )

  def loss(w, function):
    return jnp.sum(jnp.sin(function(many, w, sizes)))

  def whole(x, w, s):
    return jnp.stack([jmoe.ragged_dot(one, w, s) for one in x])

  assert_close(jax.jit(split)(many, rhs, sizes), whole(many, rhs, sizes))
  # Replicated matrices get the sum of all devices' gradients.
  found = jax.jit(jax.grad(lambda w: loss(w, split)))(rhs)
  np.testing.assert_allclose(
    found, jax.grad(lambda w: loss(w, whole))(rhs), rtol=2e-4, atol=2e-4
  )


@on_cpu
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_interpreted_hopper_products_are_those_of_jax(monkeypatch, preferred):
  from jmoe.kernels import devices, hopper, permute_rows

  monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
  # Triton's kernels are interpreted in a test of their own.
  monkeypatch.setattr(permute_rows.api, "_served", lambda rows: False)
  args = operands((130, 0, 7), m=140, k=128, n=128, dtype=jnp.bfloat16)

  def ours(a, b, s):
    return jmoe.ragged_dot(a, b, s, preferred_element_type=preferred)

  with devices.as_if("hopper"), interpreted():
    found = both(ours, *args)
  wide = [a.astype(jnp.float32) for a in args[:2]]
  rounded = args[3].astype(jnp.bfloat16).astype(jnp.float32)
  expected = both(jax.lax.ragged_dot, *wide, args[2], rounded)
  assert found[0].dtype == (preferred or jnp.bfloat16)
  if preferred is not None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-4)
  for one, other in zip(found, expected, strict=True):
    gap = jnp.linalg.norm(one.astype(jnp.float32) - other)
    assert gap < 4e-3 * jnp.linalg.norm(other)


def test_a_wider_result_of_interpreted_triton_is_not_rounded(monkeypatch):
  from jmoe.kernels import devices, permute_rows

  module = importlib.import_module("jmoe.kernels.grouped_matmul.triton")
  kernel = module.triton
  monkeypatch.setattr(module, "triton", lambda *args: kernel(*args, True))
  monkeypatch.setattr(permute_rows.api, "_served", lambda rows: False)
  args = operands(SIZES["mixed"], k=64, dtype=jnp.bfloat16)[:3]
  with devices.as_if("ampere"):
    found = jmoe.ragged_dot(*args, preferred_element_type=jnp.float32)
  expected = jax.lax.ragged_dot(*(a.astype(jnp.float32) for a in args[:2]), args[2])
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("sizes", [(130, 0, 7, 1000), (0, 0), (5,)])
def test_products_on_an_accelerator_are_those_of_float32(sizes, preferred):
  args = operands(sizes, m=1200, k=320, n=576, dtype=jnp.bfloat16)

  def ours(a, b, s):
    return jmoe.ragged_dot(a, b, s, preferred_element_type=preferred)

  found = jax.jit(lambda *a: both(ours, *a))(*args)
  wide = [a.astype(jnp.float32) for a in args[:2]]
  rounded = args[3].astype(jnp.bfloat16).astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    expected = both(jax.lax.ragged_dot, *wide, args[2], rounded)
  for one, other in zip(found, expected, strict=True):
    gap = jnp.linalg.norm(one.astype(jnp.float32) - other)
    assert gap <= 4e-3 * jnp.linalg.norm(other)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(lhs=jnp.ones((4, 5))), r"lhs \(4, 5\), rhs \(2, 6, 3\)"),
    (dict(rhs=jnp.ones((2, 6, 3), jnp.int8)), "lhs is float32 and rhs int8"),
    (dict(group_sizes=jnp.ones(3, jnp.int32)), r"group_sizes \(3,\)"),
    (dict(group_sizes=jnp.ones(2)), "group_sizes is float32"),
    (dict(precision="highest"), "precision='highest'"),
    (dict(group_offset=jnp.zeros(1, jnp.int32)), "group_offset is not supported"),
    (dict(preferred_element_type=jnp.int32), "preferred_element_type=int32"),
    (dict(preferred_element_type="bad"), "preferred_element_type='bad' is no dtype"),
  ],
)
def test_bad_arguments_are_one_line(change, said):
  good = dict(
    lhs=jnp.ones((4, 6)),
    rhs=jnp.ones((2, 6, 3)),
    group_sizes=jnp.array([1, 2], jnp.int32),
  )
  with pytest.raises(ValueError, match=said) as caught:
    jmoe.ragged_dot(**(good | change))
  assert "\n" not in str(caught.value)
