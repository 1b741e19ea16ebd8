"""Hopper's kernels: interpreted on a CPU, lowered for CUDA, run where there is one."""
# SPDX-License-Identifier: Apache-2.0

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels import devices
from jmoe.types import Groups
from tests.kernels.hopper_cases import BLOCK, Case, error, interpreted, lowers, on_cpu

# loads, depth, width, stride
SMALL = {
  "ragged": ((130, 0, 200), 128, 256, None),
  "odd tails": ((5, 128), 72, 200, None),
  "not of eight": ((3, 9), 70, 61, None),
  "buckets": ((100, 0, 256, 7), 64, 128, 256),
  "tiles and a half": ((3, 9), 64, 320, None),
  "nothing": ((0, 0), 64, 128, None),
}
LARGE = {
  "many experts": (tuple(37 * n % 700 for n in range(64)), 2048, 1536, None),
  "one expert": ((0, 0, 5000, 0), 1024, 512, None),
  "deep": ((1000, 3000), 7168, 320, None),
  "wide": ((1000, 3000), 192, 4352, None),
  "short": ((1, 0, 2, 1), 4096, 2048, None),
  "buckets": ((1000, 0, 1280, 7), 1024, 768, 1280),
  "tails": ((777, 1025), 1000, 1016, None),
}


def run(case, num_sms=None, bias=True):
  """(output, gradients of rows, matrices and biases)."""
  from jmoe.kernels.grouped_matmul.hopper import hopper

  def call(x, w, b):
    return hopper(x, w, case.groups, b, num_sms)

  bias = case.bias if bias else None
  y, pull = jax.vjp(call, case.x, case.w, bias)
  return y, *pull(case.dy)


def check(case, found, tolerance=4e-3):
  y, dx, dw, db = case.expected()
  real = case.real
  for one, other in ((found[0], y), (found[1], dx)):
    assert error(np.asarray(one, np.float64)[real], other) < tolerance
  assert error(found[2], dw) < tolerance and error(found[3], db) < tolerance
  empty = np.asarray(case.groups.rows) == 0
  assert not np.asarray(found[2], np.float32)[empty].any()


@on_cpu
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_products_and_gradients_are_right(name):
  loads, depth, width, stride = SMALL[name]
  case = Case(loads, depth, width, stride=stride)
  with interpreted():
    found = run(case, num_sms=2)
  check(case, found)


@on_cpu
def test_interpreted_models_that_share_a_program_are_right():
  cases = [Case((130, 3), 64, 128, seed=n) for n in range(2)]
  from jmoe.kernels.grouped_matmul.hopper import hopper

  def call(x, w, groups, dy):
    y, pull = jax.vjp(lambda x, w: hopper(x, w, groups, None, 2), x, w)
    return y, *pull(dy)

  groups = jax.tree.map(lambda *x: jnp.stack(x), *(c.groups for c in cases))
  operands = [jnp.stack([getattr(c, n) for c in cases]) for n in ("x", "w", "dy")]
  with interpreted():
    found = jax.vmap(call)(operands[0], operands[1], groups, operands[2])
  for n, case in enumerate(cases):
    case.bias = jnp.zeros_like(case.bias)
    _, _, _, db = case.expected()
    check(case, [*(x[n] for x in found), db])


@on_cpu
@pytest.mark.parametrize("models", [None, 2])
def test_interpreted_gradients_of_matrices_are_sums_over_all_buffers(models):
  """Experts with rows in both, in one of them, in none; buffers of other sizes."""
  from jmoe.kernels.grouped_matmul.hopper import matrices

  loads = (130, 0, 64, 0), (3, 200, 0, 0)
  seeds = range(models or 1)
  buffers = [[Case(load, 64, 128, seed=7 * s + n) for n, load in enumerate(loads)]
             for s in seeds]  # fmt: skip

  def of(cases):
    return [[getattr(c, name) for c in cases] for name in ("x", "dy", "groups")]

  with interpreted():
    if models is None:
      found = [matrices(*of(buffers[0]), num_sms=2)]
    else:
      stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(of, buffers))
      found = jax.vmap(lambda one: matrices(*one, num_sms=2))(stacked)
  for dw, cases in zip(found, buffers, strict=True):
    assert error(dw, sum(c.expected()[2] for c in cases)) < 4e-3
    assert not np.asarray(dw, np.float32)[3].any()


@on_cpu
def test_matrices_that_learn_get_their_gradient_and_no_other_does():
  """Of one expert with biases, beside plain float32."""
  from jmoe.kernels.grouped_ffn import activations
  from jmoe.kernels.grouped_ffn.hopper import fused_ffn
  from jmoe.kernels.grouped_ffn.hopper_values import Buffer, Form

  R = np.random.default_rng(0)
  draw = lambda *size: jnp.asarray(R.normal(size=size) / 8, jnp.bfloat16)  # noqa: E731
  x, dy = draw(128, 128), draw(128, 128)
  params = [draw(1, 128, 128) for _ in range(3)] + [draw(1, 128) for _ in range(3)]
  silu = activations.of(jax.nn.silu)
  assert silu is not None
  learning = (1, 3, 5)  # a matrix and the other ones' biases

  def run(params):
    held = jax.lax.stop_gradient(params)
    some = [a if n in learning else held[n] for n, a in enumerate(params)]
    *ups, down = zip(some[:3], some[3:], strict=True)
    form = Form(silu, num_sms=2)
    groups = Groups(jnp.array([0]), jnp.array([128]), 128)
    return fused_ffn(form, (Buffer(x, None, groups, None),), tuple(ups), down)[0]

  def plain(params):
    w, b = params[:3], params[3:]
    hidden = [x.astype(jnp.float32) @ w[n][0] + b[n][0] for n in range(2)]
    return (jax.nn.silu(hidden[0]) * hidden[1]) @ w[2][0] + b[2][0]

  with interpreted():
    found = jax.jit(lambda params: jax.vjp(run, params)[1](dy)[0])(params)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
  expected = jax.vjp(plain, wide)[1](dy.astype(jnp.float32))[0]
  for n, (one, other) in enumerate(zip(found, expected, strict=True)):
    if n in learning:
      assert error(one, np.asarray(other, np.float64)) < 1e-2
    else:
      assert not np.any(np.asarray(one, np.float32))


@lowers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("depth, width", [(512, 768), (256, 128), (1000, 1016)])
def test_products_and_gradients_lower_for_cuda(dtype, depth, width):
  case = Case((300, 0, 128), depth, width, dtype=dtype)
  lowered = jax.jit(lambda: run(case)).trace().lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu") >= 3


def test_the_device_is_that_which_jax_was_told_to_use(monkeypatch):
  here = jax.devices()[0]
  gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
  monkeypatch.setattr(devices.jax, "default_backend", lambda: "cuda")
  monkeypatch.setattr(devices.jax, "devices", lambda *_: [gpu])
  assert devices.current_device() == "hopper"
  for capability in ("8.0", "8.9", "10.0", "12.1"):
    gpu.compute_capability = capability
    assert devices.current_device() == "ampere"
  for capability in ("7.5", "gfx90a", None):
    gpu.compute_capability = capability
    assert devices.current_device() == "gpu"
  with jax.default_device(here):
    assert devices.current_device() == "cpu"
  with pytest.raises(ValueError, match="as_if: device='bogus'"):
    with devices.as_if("bogus"):
      pass


def test_layouts_are_aligned_for_the_device_in_view():
  with devices.as_if("hopper"):
    served = jax.__version_info__ >= devices._HOPPER_JAX
    assert devices.row_alignment(jnp.bfloat16) == (BLOCK if served else 16)
    assert devices.row_alignment(jnp.float32) == 16
  with devices.as_if("ampere"):
    assert devices.row_alignment(jnp.bfloat16) == 16
  assert devices.row_alignment(jnp.bfloat16) == 1


def test_hopper_is_refused_elsewhere():
  from jmoe.kernels import grouped_matmul

  case = Case((3,), 8, 8)
  with pytest.raises(ValueError, match="implementation='hopper' cannot serve"):
    grouped_matmul(case.x, case.w, case.groups, implementation="hopper")


@pytest.mark.accelerator
@pytest.mark.parametrize(
  ("name", "dtype"),
  [(name, jnp.bfloat16) for name in [*LARGE, *SMALL]] + [("buckets", jnp.float16)],
)
def test_products_and_gradients_are_right_on_a_hopper(name, dtype):
  loads, depth, width, stride = (LARGE | SMALL)[name]
  case = Case(loads, depth, width, stride=stride, dtype=dtype)
  check(case, jax.jit(lambda: run(case))())


@pytest.mark.accelerator
@pytest.mark.parametrize("num_sms", [1, 7, 64])
def test_fewer_multiprocessors_give_the_same_bits(num_sms):
  case = Case((130, 0, 777, 1), 512, 384)
  whole, fewer = (jax.jit(lambda n=n: run(case, n))() for n in (None, num_sms))
  for one, other in zip(whole, fewer, strict=True):
    rows = case.real if one.shape[0] == len(case.real) else slice(None)
    np.testing.assert_array_equal(np.asarray(one)[rows], np.asarray(other)[rows])


@pytest.mark.accelerator
def test_two_runs_give_the_same_bits_whatever_was_in_memory():
  case = Case((130, 0, 777, 1), 512, 384)
  step = jax.jit(lambda: run(case))
  first = [np.asarray(x) for x in step()]
  poison = jnp.full((1 << 28,), jnp.nan, jnp.bfloat16).block_until_ready()
  del poison
  for one, other in zip(first, step(), strict=True):
    rows = case.real if one.shape[0] == len(case.real) else slice(None)
    np.testing.assert_array_equal(one[rows], np.asarray(other)[rows])
