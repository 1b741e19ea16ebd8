"""The range of a stage's number: checked when it is configured."""
# SPDX-License-Identifier: Apache-2.0

import math
import numbers
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def in_range(
  name: str,
  value: Any,
  *,
  least: float = 0.0,
  most: float = math.inf,
  above: bool = False,
) -> Any:
  """A value that is a finite number in a range, as Python's number.

  Args:
    name: function and keyword, as "jitter: eps".
    value: what was given, maybe an array without dims.
    least, most: the ends of the range, allowed themselves.
    above: the lower end is not allowed.

  Raises:
    ValueError: any other value.
  """
  arrays = (np.generic, np.ndarray, jax.Array)
  if isinstance(value, arrays) and not isinstance(value, Tracer):
    value = value.item() if value.ndim == 0 else value
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if number and math.isfinite(value) and least <= value <= most:  # type: ignore[arg-type]
    if not above or value > least:  # type: ignore[operator]
      return value
  if most < math.inf:
    wanted = f"a number from {least:g} to {most:g}"
  elif least == -math.inf:
    wanted = "a finite number"
  else:
    wanted = f"a finite number {f'above {least:g}' if above else f'from {least:g} up'}"
  raise ValueError(f"{name}={value!r} must be {wanted}.")
