"""Oracle: experts that take one token, and the layer that sends tokens to them.

An expert here is a function from x_D to y_D; the makers below close over one expert's
parameters.
"""
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np

from tests.oracle.routers import ranks
from tests.oracle.scores import sigmoid, softmax


def gelu(x):
  """GELU, tanh approximation."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
  """GELU, x Phi(x)."""
  return x * np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def silu(x):
  """x sigmoid(x)."""
  return x * sigmoid(x)


def identity(x):
  """x."""
  return x


def mlp(up_DF, down_FD, act, up_bias=None, down_bias=None):
  """act(x up + b) down + b."""
  up_DF, down_FD, up_bias, down_bias = _f64(up_DF, down_FD, up_bias, down_bias)
  return lambda x: act(x @ up_DF + up_bias) @ down_FD + down_bias


def glu(gate_DF, up_DF, down_FD, act, gate_bias=None, up_bias=None, down_bias=None):
  """(act(x gate + b) * (x up + b)) down + b."""
  gate_DF, up_DF, down_FD = _f64(gate_DF, up_DF, down_FD)
  gate_bias, up_bias, down_bias = _f64(gate_bias, up_bias, down_bias)

  def expert(x):
    return (act(x @ gate_DF + gate_bias) * (x @ up_DF + up_bias)) @ down_FD + down_bias

  return expert


def gpt_oss_glu(
  gate_up, down_FD, gate_up_bias=None, down_bias=None, limit=7.0, alpha=1.702
):
  """gpt-oss (2508.10925): gate in the even of 2F columns, up in the odd ones.

  gate is clamped from above, up from both sides; (up + 1) * gate sigmoid(alpha gate).
  """
  gate_up, down_FD = _f64(gate_up, down_FD)
  gate_up_bias, down_bias = _f64(gate_up_bias, down_bias)

  def expert(x):
    hidden = x @ gate_up + gate_up_bias
    gate = np.minimum(hidden[0::2], limit)
    up = np.clip(hidden[1::2], -limit, limit)
    return ((up + 1) * gate * sigmoid(alpha * gate)) @ down_FD + down_bias

  return expert


def constant(mix_D2, v_D):
  """MoE++ (2410.07348): (a1, a2) = softmax(x mix); a1 x + a2 v."""
  mix_D2, v_D = _f64(mix_D2, v_D)

  def expert(x):
    a1, a2 = softmax(x @ mix_D2)
    return a1 * x + a2 * v_D

  return expert


def copy(x):
  """The expert that returns its token."""
  return x


def zero(x):
  """The expert that returns nothing."""
  return np.zeros_like(x)


def forward(x, entries, kept, weights, expert_fns, scale_input=False, stack=False):
  """y[T,D]: for each token the weighted sum of its kept experts' outputs.

  With `scale_input` the weight multiplies what goes in instead of what comes out.
  With `stack` the result is [T,K,D]: each choice's output, neither summed nor weighed
  on the way out; dropped choices are zero.
  """
  x = np.asarray(x, np.float64)
  num_tokens, d_model = x.shape
  rank = ranks(entries)
  y = np.zeros((num_tokens, max(rank, default=0) + 1, d_model))
  for n, entry in enumerate(entries):
    if not kept[n]:
      continue
    expert = expert_fns[entry.expert]
    if scale_input:
      y[entry.token, rank[n]] = expert(weights[n] * x[entry.token])
    else:
      out = expert(x[entry.token])
      y[entry.token, rank[n]] = out if stack else weights[n] * out
  return y if stack else np.sum(y, axis=1)


def soft_forward(x, dispatch, combine, expert_fns):
  """Soft MoE: y[G,S,D] from x[G,S,D], slot by slot."""
  x = np.asarray(x, np.float64)
  num_groups, num_tokens, num_experts, capacity = dispatch.shape
  y = np.zeros(x.shape)
  for g in range(num_groups):
    for e in range(num_experts):
      for c in range(capacity):
        slot = sum(dispatch[g, s, e, c] * x[g, s] for s in range(num_tokens))
        out = expert_fns[e](slot)
        for s in range(num_tokens):
          y[g, s] += combine[g, s, e, c] * out
  return y


def _f64(*arrays):
  """The arrays in float64; a bias that is not there is 0."""
  return [np.asarray(0.0 if a is None else a, np.float64) for a in arrays]
