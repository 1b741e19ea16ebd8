"""Masks times rows by bfloat16's units: as exact as in float32, with fewer products."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import Context, MoEConfig, capacity, dispatch, routers, use
from jmoe.assign import assign
from jmoe.kernels import devices
from jmoe.kernels.mask_product import mask_product
from jmoe.layer import apply, moe_init
from jmoe.parallel import EXPERT_TENSOR, mesh
from jmoe.types import Home
from tests._cases import quickly
from tests.jaxprs import products
from tests.parallel.cases import MATMUL
from tests.tolerance import assert_close

G, S, E, C, D = 2, 9, 3, 4, 6
OUT, HOME = "GSEC,GSD->EGCD", "GSEC,EGCD->GSD"
R = np.random.default_rng(0)
pytestmark = pytest.mark.contract


def operands(subscripts: str, weights: str):
  """(a mask with two numbers in a token's row at most, bf16 rows, a cotangent)."""
  mask = np.zeros((G * S, E * C))
  for c in range(E * C):  # a slot is one token's, and a token has two slots or fewer
    for g in range(G):
      mask[g * S + (c % E + 2 * (c // E)) % S, c] = R.normal()
  mask = mask.reshape(G, S, E, C)
  if weights == "ones":
    mask = (mask != 0).astype(np.float64)
  tokens, slots = R.normal(size=(G, S, D)), R.normal(size=(E, G, C, D))
  rows, grad = (tokens, slots) if subscripts == OUT else (slots, tokens)
  kind = jnp.bfloat16 if weights == "ones" else jnp.float32
  return jnp.asarray(mask, kind), *(jnp.asarray(a, jnp.bfloat16) for a in (rows, grad))


def both(subscripts: str, mask, rows, grad):
  """(values, the mask's gradient, the rows')."""

  def product(mask, rows):
    return mask_product(subscripts, mask, rows, rows.dtype)

  found, pull = jax.vjp(product, mask, rows)
  return found, *pull(grad)


def check(subscripts: str, given, found) -> None:
  """Against float64: half a unit in the last place, and float32's error."""
  assert [a.dtype for a in found] == [jnp.bfloat16, given[0].dtype, jnp.bfloat16]
  mask, rows, grad = (np.asarray(a, np.float64) for a in given)
  of_mask, of_rows, out = subscripts.replace("->", ",").split(",")
  formulas = (
    (subscripts, mask, rows),
    (f"{out},{of_rows}->{of_mask}", grad, rows),
    (f"{of_mask},{out}->{of_rows}", mask, grad),
  )
  for one, (formula, a, b) in zip(found, formulas, strict=True):
    true, size = np.einsum(formula, a, b), np.einsum(formula, abs(a), abs(b))
    assert size.max() > 0
    rounding = 2.0**-8 if one.dtype == jnp.bfloat16 else 2.0**-24
    gap = np.abs(np.asarray(one, np.float64) - true)
    assert (gap <= rounding * np.abs(true) + 2.0**-21 * size).all()


@pytest.mark.parametrize("device", ["cpu", "gpu", "ampere", "hopper", "tpu"])
@pytest.mark.parametrize("weights", ["ones", "float32"])
@pytest.mark.parametrize("subscripts", [OUT, HOME])
def test_values_and_gradients_are_rounded_once(subscripts, weights, device):
  given = operands(subscripts, weights)
  with devices.as_if(device):
    found = jax.jit(functools.partial(both, subscripts))(*given)
  check(subscripts, given, found)


@pytest.mark.accelerator
@pytest.mark.parametrize("weights", ["ones", "float32"])
@pytest.mark.parametrize("subscripts", [OUT, HOME])
def test_an_accelerator_rounds_once(subscripts, weights):
  given = operands(subscripts, weights)
  check(subscripts, given, jax.jit(functools.partial(both, subscripts))(*given))


def test_rows_arrive_as_they_left():
  mask, rows, grad = operands(OUT, "ones")
  with devices.as_if("tpu"):
    found = both(OUT, mask, rows, grad)[0]
  at = np.argmax(np.asarray(mask, np.float32), axis=1)  # [G,E,C] a slot's token
  expected = np.asarray(rows)[np.arange(G)[:, None, None], at]
  np.testing.assert_array_equal(found, expected.transpose(1, 0, 2, 3))


@pytest.mark.parametrize(
  ("rows", "weights", "device", "expected"),
  [
    ("bfloat16", "bfloat16", "hopper", 3),  # values, and each gradient
    ("bfloat16", "float32", "ampere", 5),  # the rows' gradient is one, of stacked parts
    ("bfloat16", "float32", "tpu", 5),
    ("bfloat16", "float32", "gpu", None),  # may have no bfloat16 units
    ("float16", "float32", "hopper", None),  # has no room for parts of small weights
    ("float32", "float32", "hopper", None),
  ],
)
def test_products_are_bfloat16s_where_rows_are(rows, weights, device, expected):
  given = [
    jnp.zeros((G, S, E, C), weights),
    jnp.zeros((E, G, C, D), rows),
    jnp.zeros((G, S, D), rows),
  ]
  platform = "tpu" if device == "tpu" else "cuda"
  with devices.as_if(device):
    traced = jax.jit(functools.partial(both, HOME)).trace(*given)
  found = products(traced.lower(lowering_platforms=(platform,)).as_text())
  wide, narrow = ("f32", "HIGHEST"), ("bf16", "DEFAULT")
  kinds = {(p.dtypes, p.precision) for p in found}
  kind, precision = wide if expected is None else narrow
  assert kinds == {((kind, kind), (precision, precision))}
  assert len(found) == (expected or 3)


@pytest.mark.parametrize("weight", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_pass_on(weight):
  mask, rows, grad = operands(HOME, "float32")
  first = tuple(np.argwhere(np.asarray(mask))[0])
  with devices.as_if("hopper"):
    found = both(HOME, mask.at[first].set(weight), rows, grad)[0]
  expected = both(HOME, mask.at[first].set(weight), rows, grad)[0]
  found, expected = (np.asarray(a, np.float32) for a in (found, expected))
  assert not np.isfinite(found).all()
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  "rows, dtype", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32",) * 2]
)
def test_other_dtypes_are_multiplied_in_float32(rows, dtype):
  mask, given, _ = operands(HOME, "float32")
  given = given.astype(rows) * (1 + 2.0**-12)
  with devices.as_if("hopper"):
    found = mask_product(HOME, mask, given, jnp.dtype(dtype))
  a, b = (np.asarray(x, np.float64) for x in (mask, given))
  true, size = np.einsum(HOME, a, b), np.einsum(HOME, abs(a), abs(b))
  assert found.dtype == dtype
  rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-24
  gap = np.abs(np.asarray(found, np.float64) - true)
  assert (gap <= rounding * np.abs(true) + 2.0**-21 * size).all()


def test_second_derivatives_are_float32s():
  mask, rows, grad = operands(HOME, "float32")

  def of(mask, rows):
    found, pull = jax.vjp(functools.partial(both, HOME, grad=grad), mask, rows)
    return pull(jax.tree.map(jnp.ones_like, found))

  with devices.as_if("tpu"):
    found = jax.jit(of)(mask, rows)
    traced = jax.jit(of).trace(mask, rows)
  made = products(traced.lower(lowering_platforms=("tpu",)).as_text())
  assert any(p.dtypes == ("f32", "f32") for p in made)
  for product in made:
    exact = "HIGHEST" if "f32" in product.dtypes else "DEFAULT"
    assert product.precision == (exact, exact)
  for one, other in zip(found, jax.jit(of)(mask, rows), strict=True):
    assert_close(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16))


def test_gradients_in_shard_map_are_sums_over_devices():
  """Of a mask that all devices share."""
  mask, rows, grad = operands(HOME, "float32")
  spec = jax.sharding.PartitionSpec
  auto = (jax.sharding.AxisType.Auto,)

  def total(mask, rows):
    y = mask_product(HOME, mask, rows, rows.dtype).astype(jnp.float32)
    return jnp.sum(y * grad.astype(jnp.float32))

  def over(mask, rows):
    return jax.shard_map(
      lambda mask, rows: jax.lax.psum(total(mask, rows[0]), "data"),
      mesh=jax.make_mesh((8,), ("data",), auto),
      in_specs=(spec(), spec("data")),
      out_specs=spec(),
    )(mask, jnp.stack([rows] * 8))

  expected = jax.jit(jax.grad(total, (0, 1)))(mask, rows)
  with devices.as_if("tpu"):
    found = jax.jit(jax.grad(over, (0, 1)))(mask, rows)
  assert_close(found[0], 8 * expected[0])
  assert_close(found[1], (8 * expected[1].astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("scale", ["input", "output"])
def test_no_weight_is_rounded(scale):
  """Experts that give back what they get; slots are rounded, and so are tokens."""
  x = jnp.asarray(R.normal(size=(11, D)), jnp.bfloat16)
  scores = jax.nn.softmax(jnp.asarray(R.normal(size=(11, E)), jnp.float32))
  routing = routers.top_k(scores, scores, scores, k=2, context=Context())
  plan = assign(routing, Context(), capacity=use(capacity.fixed, slots=11))
  ones = jnp.ones_like(routing.weight)
  way = Home(routing.weight)
  if scale == "input":
    way = Home(ones, input_scale=routing.weight)
  with devices.as_if("tpu"):
    found = dispatch.einsum(x, plan, lambda rows: rows.gathered(), way)
  weight = np.asarray(routing.weight, np.float32).reshape(11, 2, 1)
  terms = weight * np.asarray(x, np.float32)[:, None]
  if scale == "input":
    terms = terms.astype(jnp.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(found, terms.sum(1).astype(jnp.bfloat16))


CONFIG = MoEConfig(
  16,
  4,
  experts=use(jmoe.experts.glu, d_ff=8, **MATMUL),
  router=use(routers.top_k, k=2),
  capacity=use(capacity.by_factor, factor=1.0),
  dispatch=use(dispatch.einsum),
  group_size=9,
  param_dtype=jnp.bfloat16,
  sharding=EXPERT_TENSOR,
)
LAYERS = {
  "top_k": {},
  "of all tokens": dict(router=use(routers.expert_choice), capacity=None, losses=()),
  "weights on the input": dict(scale="input"),
}


def of_layer(config: MoEConfig):
  """A layer's output and gradients."""
  x = jax.random.normal(jax.random.key(1), (8, 5, 16), jnp.bfloat16)
  params = moe_init(jax.random.key(0), config)

  def total(params, x):
    y, _ = apply(params, x, config)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  with quickly():
    grads, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)
  return jax.device_get((y, grads))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_float32s_products(name):
  config = dataclasses.replace(CONFIG, **LAYERS[name])
  expected = of_layer(config)
  buckets = dataclasses.replace(config, dispatch=use(dispatch.buckets))
  with devices.as_if("tpu"):
    found = of_layer(config)
  jax.tree.map(assert_close, found, expected)
  jax.tree.map(assert_close, found, of_layer(buckets))
  y, grads = found
  assert np.mean(y != expected[0]) < 0.01  # both are rounded once
  assert all(np.asarray(g, np.float32).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_layer_over_a_mesh_is_that_of_one_device(explicit):
  expected = of_layer(CONFIG)
  made = mesh.make("data=2,expert=4", explicit=explicit)
  with devices.as_if("tpu"), jax.set_mesh(made):
    found = of_layer(CONFIG)
  jax.tree.map(assert_close, found, expected)


def test_gradients_lie_as_their_arrays_do():
  """Rows that come split along d_model, on a mesh of explicit axes."""
  given = operands(HOME, "float32")
  spec = jax.sharding.PartitionSpec
  made = mesh.make("data=2,expert=4", explicit=True)
  with jax.set_mesh(made):
    places = spec(), spec(None, None, None, "data"), spec(None, None, "data")
    split = [
      jax.device_put(a, jax.sharding.NamedSharding(made, at))
      for a, at in zip(given, places, strict=True)
    ]
    with devices.as_if("tpu"):
      found = jax.jit(functools.partial(both, HOME))(*split)
  for one, at in zip(found, (places[2], places[0], places[1]), strict=True):
    assert one.sharding.is_equivalent_to(jax.sharding.NamedSharding(made, at), one.ndim)
  check(HOME, given, jax.device_get(found))
