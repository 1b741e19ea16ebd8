"""Running sums and searches over experts, in as few launches as there may be.

On an accelerator the arrays are so small that each launch costs more than its work: so
everything is compared with everything, where sums and searches take steps.
"""
# SPDX-License-Identifier: Apache-2.0

import math

import jax.numpy as jnp
from jax import Array

from jmoe.kernels.devices import current_device
from jmoe.kernels.varying import together

_MOST = 1 << 22  # comparisons of one launch


def running(counts_E: Array) -> Array:
  """i32[E] the sum of the counts up to each and with it, as of `jnp.cumsum`."""
  E = counts_E.shape[0]
  if current_device() == "cpu" or E * E > _MOST:
    return jnp.cumsum(counts_E, dtype=jnp.int32)
  index_E = jnp.arange(E, dtype=jnp.int32)
  upto_EE = index_E[None, :] <= index_E[:, None]
  return jnp.sum(jnp.where(upto_EE, counts_E[None, :], 0), axis=1, dtype=jnp.int32)


def places(sorted_N: Array, values_Q: Array, *, side: str = "left") -> Array:
  """i32[Q] how many of a rising array are below each value.

  As of `jnp.searchsorted`.  A long array is searched in two steps: which of some
  windows, and where in it.

  Args:
    sorted_N: i32[N].
    values_Q: i32[Q], below the largest i32.
    side: "left", or "right" to count equal ones too.
  """
  sorted_N, values_Q = together(sorted_N, values_Q)  # what a search is asked for
  N, Q = sorted_N.shape[0], values_Q.shape[0]
  if current_device() == "cpu":
    return jnp.searchsorted(sorted_N, values_Q, side=side).astype(jnp.int32)
  if N * Q <= _MOST:
    return _below(sorted_N[None, :], values_Q, side)
  width = 1 << math.ceil(math.log2(N) / 2)
  first_W = sorted_N[::width]
  # The first of that many windows are below the value: it is in the last of them.
  window_Q = jnp.maximum(_below(first_W[None, :], values_Q, side) - 1, 0)
  last = jnp.iinfo(sorted_N.dtype).max
  end = first_W.shape[0] * width - N
  windows_WN = jnp.pad(sorted_N, (0, end), constant_values=last).reshape(-1, width)
  # The windows before it are as many elements, one more of each place in a window: in
  # the same sum, since an addition afterwards is a launch of its own.
  return _below(windows_WN[window_Q], values_Q, side, window_Q)


def _below(
  sorted_QN: Array, values_Q: Array, side: str, more_Q: Array | None = None
) -> Array:
  values_Q1 = values_Q[:, None]
  below_QN = sorted_QN < values_Q1 if side == "left" else sorted_QN <= values_Q1
  count_QN = below_QN.astype(jnp.int32)
  if more_Q is not None:
    count_QN += more_Q[:, None]
  return jnp.sum(count_QN, axis=1, dtype=jnp.int32)
