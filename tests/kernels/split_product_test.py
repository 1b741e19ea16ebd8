"""Products of bfloat16 parts are as exact as float32's own."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gates._product import product
from jmoe.kernels import devices, split_product
from tests.jaxprs import products
from tests.kernels.hopper_cases import error, hopper

T, D, E = 70, 150, 6
R = np.random.default_rng(0)
SUBSCRIPTS = "TD,DE->TE"
pytestmark = pytest.mark.contract


def operands(name: str):
  """(tokens in bfloat16, matrix, cotangent)."""
  x_TD, w_DE, g_TE = (R.normal(size=s) for s in ((T, D), (D, E), (T, E)))
  if name == "cancelling":  # what is left is a millionth of the terms
    x_TD[:, D // 2 :] = x_TD[:, : D // 2]
    w_DE[D // 2 :] = -w_DE[: D // 2] * (1 + 1e-6 * R.normal(size=(D // 2, E)))
    g_TE[:, E // 2 :] = -g_TE[:, : E // 2] * (1 + 1e-6)
    w_DE[:, E // 2 :] = w_DE[:, : E // 2]
  elif name == "tiny and huge":
    w_DE *= np.where(np.arange(D) % 2, 1e-30, 1e30)[:, None]
    x_TD *= np.arange(D) % 2 == np.arange(T)[:, None] % 2  # never both in a sum
    g_TE *= 10.0 ** R.integers(-6, 6, g_TE.shape)
  elif name == "largest":
    w_DE, x_TD = np.full_like(w_DE, np.finfo(np.float32).max), x_TD * 0
    x_TD[:, 3], g_TE = 1, 1e-3 * g_TE
  return jnp.asarray(x_TD, jnp.bfloat16), *(
    jnp.asarray(a, jnp.float32) for a in (w_DE, g_TE)
  )


@jax.jit
def _both(x_TD, w_DE, g_TE):
  """Values and gradients: by parts, at the highest precision."""

  def grads(of):
    y_TE, pull = jax.vjp(of, x_TD.astype(jnp.float32), w_DE)
    return y_TE, *pull(g_TE)

  def parts(x_TD, w_DE):
    return split_product.split_product(SUBSCRIPTS, x_TD.astype(jnp.bfloat16), w_DE)

  highest = jax.lax.Precision.HIGHEST
  return grads(parts), grads(lambda x, w: jnp.matmul(x, w, precision=highest))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  monkeypatch.setattr(split_product, "_CHUNK", 64)


@pytest.mark.parametrize("name", ["normal", "cancelling", "tiny and huge", "largest"])
def test_errors_are_those_of_float32(name):
  """Of the sum of the terms' sizes, against float64."""
  x, w, g = operands(name)
  found, highest = _both(x, w, g)
  wide = [np.asarray(a, np.float64) for a in (x, w, g)]
  (x, w, g), sizes = wide, [np.abs(a) for a in wide]
  true = [x @ w, g @ w.T, x.T @ g]
  size = [sizes[0] @ sizes[1], sizes[2] @ sizes[1].T, sizes[0].T @ sizes[2]]
  for n, (one, other) in enumerate(zip(found, highest, strict=True)):
    ours, theirs = (
      np.max(np.abs(np.asarray(a, np.float64) - true[n]) / np.maximum(size[n], 1e-300))
      for a in (one, other)
    )
    # The tokens' gradient is rounded to bfloat16.
    assert ours <= (2**-8 if n == 1 else max(2 * theirs, 2**-23)), (n, ours, theirs)


def test_a_gradient_is_exact_before_it_is_rounded():
  _, w, g = operands("cancelling")
  found = jax.jit(lambda g, w: split_product._of_two("TE,DE->TD", g, w))(g, w)
  g, w = (np.asarray(a, np.float64) for a in (g, w))
  error = np.abs(np.asarray(found, np.float64) - g @ w.T) / (np.abs(g) @ np.abs(w).T)
  assert error.max() < 2**-22


def test_parts_add_up_exactly():
  bits = R.integers(0, 2**32, 10_000, dtype=np.uint64).astype(np.uint32)
  values = bits.view(np.float32)
  values = values[np.isfinite(values) & (np.abs(values) > 2.0**-100)]
  parts = [np.asarray(p, np.float64) for p in jax.jit(split_product.parts)(values)]
  np.testing.assert_array_equal(sum(parts), values.astype(np.float64))
  assert all(np.isfinite(p).all() and (p * values >= 0).all() for p in parts)


def test_infinities_and_nan_pass_on():
  x, w, g = (np.asarray(a, np.float32) for a in operands("normal"))
  w = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)  # with parts of zero
  x[0, 1], x[2, 1], x[4, 1], x[6, :] = np.inf, -np.inf, np.nan, 0
  w[5, 0], w[7, 1], w[9, 2] = np.inf, -np.inf, np.nan
  found, highest = _both(*(jnp.asarray(a) for a in (x, w, g)))
  np.testing.assert_array_equal(*(np.isnan(a[0]) for a in (found, highest)))
  np.testing.assert_array_equal(*(np.isposinf(a[0]) for a in (found, highest)))
  np.testing.assert_array_equal(*(np.isfinite(a[1]) for a in (found, highest)))
  np.testing.assert_array_equal(*(np.isnan(a[2]) for a in (found, highest)))


def test_equal_columns_give_equal_logits():
  x, w, g = operands("normal")
  y_TE = _both(x, w.at[:, 4].set(w[:, 1]), g)[0][0]
  np.testing.assert_array_equal(y_TE[:, 4], y_TE[:, 1])


def test_it_is_the_same_under_transformations():
  """Also its second derivative, and in `shard_map` with the tokens split."""
  x, w, _ = operands("normal")
  x, w = jnp.stack([x[:64]] * 8), 0.1 * w

  def loss(of):
    def one(x, w):
      return jnp.sum(jnp.sin(of(x, w)))

    def whole(w, x):
      each = jax.vmap(jax.checkpoint(one), in_axes=(0, None))(x, w)
      scanned = jax.lax.scan(lambda s, x: (s + one(x, w), None), 0.0, x)[0]
      twice = jax.grad(lambda w: jnp.sum(jax.grad(one, argnums=1)(x[0], w) ** 2))(w)
      return jnp.sum(each) + scanned + jnp.sum(twice)

    auto = (jax.sharding.AxisType.Auto,)
    spec, mesh = jax.sharding.PartitionSpec, jax.make_mesh((8,), ("data",), auto)
    split = jax.shard_map(
      lambda w, x: jax.lax.psum(one(x[0], w), "data"),
      mesh=mesh,
      in_specs=(spec(), spec("data")),
      out_specs=spec(),
    )
    return jax.jit(jax.grad(lambda w: whole(w, x) + split(w, x)))(w)

  found = loss(lambda x, w: split_product.split_product(SUBSCRIPTS, x, w))
  expected = loss(lambda x, w: product(SUBSCRIPTS, x, w))
  assert error(found, np.asarray(expected, np.float64)) < 1e-4  # bfloat16 in between


@pytest.mark.parametrize(
  ("tokens", "matrix", "split"),
  [
    ("bfloat16", "float32", (2, 1, 2)),
    ("bfloat16", "bfloat16", (1, 1, 2)),
    ("float32", "float32", None),
    ("float16", "float32", None),
  ],
)
def test_gpus_multiply_parts_of_bfloat16_tokens_only(tokens, matrix, split):
  """Forward, the tokens' gradient and the matrix's, each as few products."""
  given = [jnp.zeros((T, D), tokens), jnp.zeros((D, E), matrix)]

  def both(x, w):
    y, pull = jax.vjp(lambda x, w: product(SUBSCRIPTS, x, w), x, w)
    return y, pull(jnp.ones_like(y))

  with hopper():
    traced = jax.jit(both).trace(*given)
  found = products(traced.lower(lowering_platforms=("cuda",)).as_text())
  kinds = {p.dtypes for p in found}
  assert kinds == ({("f32", "f32")} if split is None else {("bf16", "bf16")})
  assert len(found) == (3 if split is None else sum(split))
  for device in ("cpu", "gpu", "tpu"):
    with devices.as_if(device):
      assert not split_product.splits(*given)
