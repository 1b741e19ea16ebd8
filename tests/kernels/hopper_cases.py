"""Operands for a GPU's kernels, what they give in float64, and where those run."""
# SPDX-License-Identifier: Apache-2.0

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels import devices
from jmoe.kernels.row_blocks import in_used_blocks
from jmoe.types import Groups

BLOCK = 128


def on_cpu(test):
  """Interpreted, in the leg of CI that has the jax which was tried for it."""
  tried = (0, 11) <= jax.__version_info__ < (0, 12)
  skipped = pytest.mark.skipif(not tried, reason="interpreting was tried with jax 0.11")
  return pytest.mark.contract(skipped(test))


lowers = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")


def interpreted():
  from jax.experimental.pallas import mosaic_gpu

  return mosaic_gpu.force_gpu_interpret_mode()


def hopper():
  """As if an H100 were here, for jmoe and, from jax 0.11 on, for Pallas."""
  stack = contextlib.ExitStack()
  stack.enter_context(devices.as_if("hopper"))
  if jax.__version_info__ >= (0, 11):
    device = jax.sharding.AbstractDevice(
      device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
  return stack


@pytest.fixture
def as_hopper(monkeypatch):
  """A Hopper GPU of two multiprocessors, interpreted; what is Triton's is plain jax.

  Rows that need not be written hold NaN.
  """
  from jmoe.kernels import hopper, permute_rows
  from jmoe.kernels.top_k import api as choices

  monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
  monkeypatch.setattr(permute_rows.api, "_served", lambda rows: False)
  real = permute_rows.spread

  def spread(x_TD, layout, *, block=None):
    x_RD = real(x_TD, layout)
    if block is None:
      return x_RD
    read_R = in_used_blocks(layout.groups, layout.num_rows, block)
    return jnp.where(read_R[:, None], x_RD, jnp.nan)

  monkeypatch.setattr(permute_rows, "spread", spread)
  monkeypatch.setattr(choices, "_served", lambda values, k: False)
  with devices.as_if("hopper"), interpreted():
    yield


class Case:
  """Rows of some experts, their matrices, and a cotangent.

  Args:
    loads: rows of each expert.
    depth, width: of the matrices.
    dtype: of everything.
    stride: rows between two experts, of capacity buckets; None: ragged.
    spare: blocks after the last expert's.
    block: rows to which the layout is aligned.
  """

  def __init__(
    self,
    loads,
    depth,
    width,
    *,
    dtype=jnp.bfloat16,
    stride=None,
    spare=1,
    seed=0,
    block=BLOCK,
  ):
    rng = np.random.default_rng(seed)
    loads = np.asarray(loads)
    padded = -(-loads // block) * block
    if stride is not None:
      padded = np.full_like(loads, stride)
    start = np.cumsum(padded) - padded
    R = int(padded.sum()) + spare * block
    self.real = np.zeros(R, bool)
    self.expert = np.zeros(R, int)
    for e, (s, n) in enumerate(zip(start, loads, strict=True)):
      self.real[s : s + n] = True
      self.expert[s : s + n] = e
    rows = np.where(self.real[:, None], 1.0, 0.0)
    x = rng.normal(size=(R, depth)) * rows
    w = rng.normal(size=(len(loads), depth, width)) / np.sqrt(depth)
    dy = rng.normal(size=(R, width)) * rows
    bias = rng.normal(size=(len(loads), width))
    self.x, self.w, self.dy, self.bias = (
      jnp.asarray(a, dtype) for a in (x, w, dy, bias)
    )
    self.groups = Groups(
      jnp.asarray(start, jnp.int32), jnp.asarray(loads, jnp.int32), block, stride
    )

  def expected(self):
    """(rows that exist, gradients of x's rows that exist, w and bias)."""
    x, w, dy, bias = (
      np.asarray(a, np.float64) for a in (self.x, self.w, self.dy, self.bias)
    )
    own = self.expert[self.real]
    y = np.empty((self.real.sum(), w.shape[2]))
    dx = np.empty((self.real.sum(), w.shape[1]))
    dw, db = np.zeros_like(w), np.zeros_like(bias)
    for e in range(len(w)):
      mine, whole = own == e, self.real & (self.expert == e)
      y[mine] = x[whole] @ w[e] + bias[e]
      dx[mine] = dy[whole] @ w[e].T
      dw[e], db[e] = x[whole].T @ dy[whole], dy[whole].sum(0)
    return y, dx, dw, db


def error(found, expected) -> float:
  """Norm of the difference over the norm."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected)
  return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
