"""`jax.export` of a layer: for each platform, with gradients, and back from bytes."""
# SPDX-License-Identifier: Apache-2.0

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jmoe
from jmoe.kernels import devices
from tests.kernels.hopper_cases import hopper

CONFIG = jmoe.simple(128, 64, num_experts=4, k=2)
# Hopper's kernels, and Triton's for rows; jax promises no stability for either.
UNSTABLE = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")
new = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")


def operands(dtype=jnp.float32):
  params = jmoe.moe_init(jax.random.key(0), CONFIG)
  x_TD = jax.random.normal(jax.random.key(1), (32, 128))
  return jax.tree.map(lambda x: x.astype(dtype), (params, x_TD))


def layer(params, x_TD):
  return jmoe.moe(params, x_TD, CONFIG)[0]


forward = jax.jit(layer)


@jax.jit
def gradients(params, x_TD):
  # Not `forward`, which may have been traced for another device.
  loss = lambda *given: jnp.sum(jnp.sin(layer(*given).astype(jnp.float32)))  # noqa: E731
  return jax.grad(loss, (0, 1))(params, x_TD)


def traced(function):
  """The function without what was traced for another device."""
  return jax.jit(lambda *given: function.__wrapped__(*given))


@pytest.mark.contract
@pytest.mark.parametrize("function", [forward, gradients])
@pytest.mark.parametrize(
  ("device", "platform"), [("cpu", "cpu"), ("tpu", "tpu"), ("gpu", "cuda")]
)
def test_a_layer_is_exported_without_disabled_checks(function, device, platform):
  with devices.as_if(device):
    made = export.export(traced(function), platforms=[platform])(*operands())
  assert made.platforms == (platform,)
  if device == "cpu":
    found, expected = made.call(*operands()), function(*operands())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@new
@pytest.mark.parametrize(("function", "products"), [(forward, 2), (gradients, 4)])
def test_hoppers_kernels_are_exported_by_name(function, products):
  disabled = [export.DisabledSafetyCheck.custom_call(name) for name in UNSTABLE]
  given = operands(jnp.bfloat16)
  with hopper():
    made = export.export(
      traced(function), platforms=["cuda"], disabled_checks=disabled
    )(*given)
    with pytest.raises(ValueError, match="no compatibility guarantees"):
      export.export(traced(function), platforms=["cuda"])(*given)
  calls = re.findall(r"custom_call @([^(]+)\(", made.mlir_module())
  assert calls.count("mosaic_gpu_v2") >= products
  assert {name for name in calls if "gpu" in name} == set(UNSTABLE)
  with pytest.raises(ValueError, match="was exported for platforms"):
    made.call(*given)


def test_bytes_come_back_with_a_gradient():
  pytest.importorskip("flatbuffers")  # which jax serialises with, and does not install
  made = export.export(forward)(*operands()).serialize(vjp_order=1)
  back = export.deserialize(made)
  np.testing.assert_array_equal(back.call(*operands()), forward(*operands()))
  found = jax.grad(lambda *given: jnp.sum(jnp.sin(back.call(*given))), (0, 1))(
    *operands()
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    gradients(*operands()),
  )


def test_the_number_of_sequences_may_be_a_symbol():
  params, x_TD = operands()
  (B,) = export.symbolic_shape("B")

  def batched(params, x_BTD):
    return jax.vmap(lambda x_TD: forward.__wrapped__(params, x_TD))(x_BTD)

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  made = export.export(jax.jit(batched))(
    shapes, jax.ShapeDtypeStruct((B, *x_TD.shape), x_TD.dtype)
  )
  x_BTD = jnp.stack([x_TD, x_TD + 1, -x_TD])
  found = made.call(params, x_BTD)
  expected = jnp.stack([forward(params, x) for x in x_BTD])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
