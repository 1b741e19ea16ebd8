"""What the routing front is made of on an accelerator, against NumPy and plain jax."""
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels import counting, devices
from jmoe.kernels.top_k import top_k
from jmoe.routers.token_choice import pick
from tests.kernels.hopper_cases import hopper, lowers

R = np.random.default_rng(0)
SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1, -1], np.float32)


@lowers
@pytest.mark.parametrize(
  ("values", "k"),
  [
    (R.normal(size=(70, 256)), 8),
    (R.choice(SPECIAL, size=(37, 50)), 7),
    (R.choice(SPECIAL, size=(3, 5)), 5),
  ],
  ids=["normal", "ties", "all"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_interpreted_choices_are_those_of_a_sort(values, k, dtype):
  from jmoe.kernels.top_k import triton

  values = jnp.asarray(values, dtype)
  found = triton.top_k(values, k, interpret=True)
  np.testing.assert_array_equal(found, jax.lax.top_k(values, k)[1])


@lowers
def test_choices_lower_for_cuda_to_one_kernel_without_a_gradient():
  def chosen(values):
    return jnp.sum(jnp.take_along_axis(values, top_k(values, 2), axis=-1))

  with hopper():
    traced = jax.jit(jax.grad(chosen)).trace(
      jax.ShapeDtypeStruct((9, 4, 40), "float32")
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1
  assert "chlo.top_k" not in text and "stablehlo.sort" not in text


@pytest.mark.parametrize("most", [64, 1 << 22])
def test_places_are_those_of_a_search(most, monkeypatch):
  """In one step and in two; also of values that are not there."""
  monkeypatch.setattr(counting, "_MOST", most)
  for N, high in [(0, 1), (65, 7), (256, 1)]:
    rising = np.sort(R.integers(0, high, N)).astype(np.int32)
    values = np.arange(-1, high + 2, dtype=np.int32)
    for side in ("left", "right"):
      with devices.as_if("gpu"):
        found = counting.places(jnp.asarray(rising), jnp.asarray(values), side=side)
      np.testing.assert_array_equal(found, np.searchsorted(rising, values, side=side))


@pytest.mark.parametrize("E", [1, 40, 3000])
def test_running_sums_are_cumulative(E):
  counts = R.integers(0, 9, E).astype(np.int32)
  with devices.as_if("gpu"):
    np.testing.assert_array_equal(
      counting.running(jnp.asarray(counts)), counts.cumsum()
    )


def test_the_gradient_of_a_choice_is_the_same_in_both_forms():
  values, ids = jnp.zeros((20, 6)), R.integers(-1, 7, (20, 3)).astype(np.int32)
  grad = R.normal(size=(20, 3)).astype(np.float32)
  pull = jax.vjp(lambda v: pick(v, ids), values)[1]
  expected = pull(grad)[0]
  with devices.as_if("gpu"):
    np.testing.assert_allclose(pull(grad)[0], expected, rtol=1e-6)
