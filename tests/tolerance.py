"""How close two results must be: one place, per dtype, never loosened to pass.

Bounds hold for the test sizes (widths and token counts up to a few hundred, entries of
order one): rounding of a sum of a few hundred products, with a margin of about ten.
"""
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
import numpy as np

TOLERANCE = {  # narrowest first
  "bfloat16": dict(rtol=2e-2, atol=2e-2),
  "float16": dict(rtol=2e-3, atol=2e-3),
  "float32": dict(rtol=2e-5, atol=1e-5),
  "float64": dict(rtol=1e-10, atol=1e-12),
}
FINITE_DIFFERENCE = dict(rtol=1e-5, atol=1e-7)  # central, float64, steps near 1e-5


def of(*dtypes) -> dict[str, float]:
  """`rtol` and `atol` of the narrowest float among some dtypes; 0 if there is none."""
  names = {jnp.dtype(dtype).name for dtype in dtypes}
  found = [limits for name, limits in TOLERANCE.items() if name in names]
  return found[0] if found else dict(rtol=0.0, atol=0.0)


def assert_close(actual, expected, err_msg: str = "") -> None:
  """Two arrays agree as far as the narrower of their dtypes allows.

  Integers and booleans, on both sides, must be equal.

  Raises:
    AssertionError: they differ, or their shapes do.
  """
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape} {err_msg}"
  limits = of(actual.dtype, expected.dtype)
  if limits["rtol"] == 0:
    np.testing.assert_array_equal(actual, expected, err_msg=err_msg)
  else:
    wide = (a.astype(np.float64) for a in (actual, expected))
    np.testing.assert_allclose(*wide, **limits, err_msg=err_msg)
