"""Every way to make a tile on Hopper gives the same: the table may choose any."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels.grouped_ffn import activations
from tests.kernels.hopper_cases import Case, error, interpreted, lowers, on_cpu

WAYS = {
  "whole": {},
  "clusters, odd": dict(cluster=2, stages=3),
  "in flight": dict(in_flight=True),
  "alternating": dict(alternating=True),
  "alternating, in flight, clusters": dict(alternating=True, in_flight=True, cluster=2),
}
# What the table may say of itself is switched off first.
PLAIN = dict(in_flight=False, alternating=False)
DEPTH, WIDTH = 192, 256  # three steps, so that no number of slots but three fits


def tile(kernel, way, **sizes):
  """The table's tile, made another way."""
  from jmoe.kernels.hopper_tiles import choose

  fields = PLAIN | WAYS[way]
  chosen = choose(kernel, **sizes)
  if fields.get("alternating") and chosen.cols > 128:
    chosen = dataclasses.replace(chosen, cols=128)  # what a warpgroup's registers hold
  if fields.get("alternating") and kernel == "hidden":
    chosen = dataclasses.replace(chosen, cols=64)
  return dataclasses.replace(chosen, **fields)


class Operands:
  def __init__(self):
    self.case = Case((130, 0, 70), DEPTH, WIDTH, spare=0)
    rng = np.random.default_rng(5)
    R = len(self.case.real)
    self.g, self.u = (jnp.asarray(rng.normal(size=(R, WIDTH)), jnp.bfloat16),) * 2
    self.u = -self.u[::-1]
    self.weight = jnp.asarray(rng.normal(size=R), jnp.float32)

  def run(self, way):
    """Products, their gradients, and the gated unit's two kernels."""
    from jmoe.kernels.grouped_ffn import hopper_kernels as gated
    from jmoe.kernels.grouped_matmul import hopper as kernels

    case, sms = self.case, dict(num_sms=4)
    silu = dict(activation=activations.silu, ups=2, **sms)
    sizes = dict(width=WIDTH, depth=DEPTH)
    y = kernels.rows(
      ((case.x, case.w),), case.groups, tile=tile("rows", way, **sizes), **sms
    )
    dx = kernels.rows(
      ((case.dy, case.w),),
      case.groups,
      transpose=True,
      tile=tile("rows", way, width=DEPTH, depth=WIDTH),
      **sms,
    )
    dw = kernels.matrices(
      [case.x], [case.dy], [case.groups], tile=tile("matrices", way, width=WIDTH), **sms
    )
    hidden = gated.hidden_kernel(
      case.groups,
      case.x,
      case.w,
      case.w,
      self.weight,
      biased=False,
      hidden=True,
      product=True,
      tile=tile("hidden", way, operands=3, **sizes),
      **silu,
    )
    back = gated.back_kernel(
      case.groups,
      case.x,
      jnp.swapaxes(case.w, 1, 2),
      self.g,
      self.u,
      self.weight,
      tile=tile("back", way, **sizes),
      **silu,
    )
    return y, dx, dw, *hidden, *back

  def expected(self):
    """The same in float64, of rows that exist."""
    case, real = self.case, self.case.real
    wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
    y, dx, dw, _ = case.expected()
    y = y - wide(case.bias)[case.expert[real]]
    weight = wide(self.weight)[real][:, None]
    g, u = wide(self.g)[real], wide(self.u)[real]

    def silu(x):
      gate = 1 / (1 + np.exp(-x))
      return x * gate, gate * (1 + x * (1 - gate))

    hidden = y, y, weight * silu(y)[0] * y
    value, slope = silu(g)
    back = y * weight * u * slope, y * weight * value, weight * value * u
    return y, dx, dw, *hidden, *back, (y * value * u).sum(axis=1)


def check(operands, found):
  real, expected = operands.case.real, operands.expected()
  for n, (one, other) in enumerate(zip(found, expected, strict=True)):
    rows = slice(None) if n == 2 else real
    assert error(np.asarray(one, np.float64)[rows], other) < 3e-3, n


@on_cpu
@pytest.mark.parametrize("way", ["in flight", "alternating, in flight, clusters"])
def test_interpreted_ways_are_right(way):
  operands = Operands()
  with interpreted():
    found = operands.run(way)
  check(operands, found)


@lowers
@pytest.mark.parametrize("way", WAYS)
def test_every_way_lowers_for_cuda(way):
  operands = Operands()
  traced = jax.jit(lambda: operands.run(way)).trace()
  assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 5


@pytest.mark.accelerator
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_right_on_a_hopper(way):
  operands = Operands()
  check(operands, jax.jit(lambda: operands.run(way))())


@lowers
def test_the_tiles_of_the_table_fit_into_memory():
  from jmoe.kernels.hopper_tiles import choose

  for width in (128, 256):
    for operands in (2, 4):
      made = choose("rows", width=width, operands=operands)
      step = operands // 2 * (made.rows + made.cols) * 64 * 2
      assert made.stages >= 2 and made.stages * step <= 227 * 1024
