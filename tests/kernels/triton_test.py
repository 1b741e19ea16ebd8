"""Grouped matmul in Triton: interpreted on a CPU, lowered for CUDA, run on a GPU."""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import functools
import importlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jmoe.kernels import devices
from jmoe.kernels.grouped_matmul import grouped_matmul, reference
from jmoe.types import Groups
from tests.kernels.hopper_cases import Case, error
from tests.tolerance import assert_close

# The package of the same name is hidden behind the function.
API = importlib.import_module("jmoe.kernels.grouped_matmul.api")
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

# loads, depth, width, block, stride
SMALL = {
  "ragged": ((70, 0, 20), 64, 144, 64, None),
  "odd tails": ((5, 17, 1), 70, 61, 16, None),
  "buckets": ((20, 0, 64, 7), 33, 72, 32, 64),
  "one expert": ((9,), 16, 8, 48, None),
  "nothing": ((0, 0), 40, 24, 16, None),
}
LARGE = {
  "many experts": (tuple(37 * n % 700 for n in range(64)), 2048, 1536, 64, None),
  "one expert": ((0, 0, 5000, 0), 1024, 512, 128, None),
  "deep": ((1000, 3000), 7168, 320, 64, None),
  "wide": ((1000, 3000), 192, 4352, 64, None),
  "short": ((1, 0, 2, 1), 4096, 2048, 16, None),
  "buckets": ((1000, 0, 1280, 7), 1024, 768, 32, 1280),
  "tails": ((777, 1025), 1001, 1017, 64, None),
}


def of(loads, depth, width, block, stride, **more):
  return Case(loads, depth, width, block=block, stride=stride, **more)


def run(case, interpret=False):
  """(output, gradients of rows, matrices and biases).

  Rows that are no expert's hold NaN, going in and coming back.
  """
  from jmoe.kernels.grouped_matmul.triton import triton

  def call(x, w, b):
    return triton(x, w, case.groups, b, None, interpret)

  real = case.real[:, None]
  y, pull = jax.vjp(call, jnp.where(real, case.x, jnp.nan), case.w, case.bias)
  return y, *pull(jnp.where(real, case.dy, jnp.nan))


def expected(case):
  """The same from the reference, in float32."""
  x, w, b, dy = (a.astype(jnp.float32) for a in (case.x, case.w, case.bias, case.dy))
  y, pull = jax.vjp(lambda x, w, b: reference(x, w, case.groups, b), x, w, b)
  return y, *pull(jnp.where(case.real[:, None], dy, 0))


def check(case, found):
  """Against the reference, as close as the dtype allows, where rows exist."""
  for n, (one, other) in enumerate(
    zip(found, jax.jit(lambda: expected(case))(), strict=True)
  ):
    assert one.dtype == case.x.dtype
    one, other = (np.asarray(a, np.float64) for a in (one, other))
    if n < 2:  # of rows, not of experts
      one, other = one[case.real], other[case.real]
    scale = max(1.0, np.abs(other).max(initial=0))  # sums of products, not entries
    one, other = (jnp.asarray(a / scale, case.x.dtype) for a in (one, other))
    assert_close(one, other)
  empty = np.asarray(case.groups.rows) == 0
  assert not np.asarray(found[2], np.float32)[empty].any()


@pytest.mark.contract
@pytest.mark.parametrize(
  ("name", "dtype"),
  [(name, jnp.float32) for name in SMALL]
  + [("ragged", jnp.bfloat16), ("buckets", jnp.float16)],
)
def test_interpreted_products_and_gradients_are_those_of_the_reference(name, dtype):
  case = of(*SMALL[name], dtype=dtype)
  check(case, jax.jit(lambda: run(case, interpret=True))())


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  loads=st.lists(st.sampled_from([0, 1, 15, 16, 33]), min_size=1, max_size=5),
  depth=st.integers(1, 40),
  width=st.integers(1, 140),
  block=st.sampled_from([16, 32]),
  dtype=st.sampled_from(DTYPES),
)
def test_any_shape_gives_what_the_reference_gives(loads, depth, width, block, dtype):
  case = Case(loads, depth, width, block=block, dtype=dtype)
  check(case, jax.jit(lambda: run(case, interpret=True))())


def test_blocks_without_rows_are_not_written():
  from jmoe.kernels.grouped_matmul.triton import rows

  case = of(*SMALL["buckets"], dtype=jnp.float32)
  y = jax.jit(lambda x, w: rows(x, w, case.groups, interpret=True))(
    jnp.ones_like(case.x), case.w
  )
  start, count = (np.asarray(a) for a in (case.groups.start, case.groups.rows))
  written = np.zeros(len(case.real), bool)
  for e, first in enumerate(start):
    written[first : first + -(-count[e] // 32) * 32] = True
  assert not written.all() and not np.isnan(y)[written].any()
  assert np.isnan(y)[~written].all()  # what interpreting puts there first


def test_nothing_is_stored_past_the_end_of_an_array(monkeypatch):
  """Interpreting would drop it; on a GPU it would lie in another row."""
  from jax.experimental.pallas import triton as plt

  case = Case((3, 20), 70, 61, block=16, dtype=jnp.float32)
  stored, of_jax = [], plt.store

  def store(ref, value, *, mask=None):
    whole = jnp.ones(value.shape, bool) if mask is None else mask
    jax.debug.callback(lambda mask: stored.append(int(mask.sum())), whole)
    of_jax(ref, value, mask=mask)

  monkeypatch.setattr(plt, "store", store)
  jax.jit(lambda: run(case, interpret=True))()
  jax.effects_barrier()
  assert sum(stored) == 3 * 16 * (61 + 70) + 2 * 70 * 61  # three blocks have rows


def test_operands_of_two_types_are_multiplied_in_the_wider():
  case = of(*SMALL["ragged"], dtype=jnp.float32)
  from jmoe.kernels.grouped_matmul.triton import triton

  x = case.x.astype(jnp.bfloat16)

  def call(x, w):
    return triton(x, w, case.groups, None, jnp.float32, True)

  def both(x, w):
    y, pull = jax.vjp(call, x, w)
    return y, *pull(case.dy)

  y, dx, dw = jax.jit(both)(x, case.w)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  wide = reference(x.astype(jnp.float32), case.w, case.groups)
  assert_close(y[case.real], wide[case.real])


def interpreted(monkeypatch):
  """The table's Triton is interpreted; rows and choices are plain jax's."""
  from jmoe.kernels import permute_rows
  from jmoe.kernels.grouped_matmul.triton import triton
  from jmoe.kernels.top_k import api as choices

  def call(x, w, groups, bias=None):
    return triton(x, w, groups, bias, None, True)

  monkeypatch.setitem(API._IMPLEMENTATIONS, "triton", call)
  monkeypatch.setattr(permute_rows.api, "_served", lambda rows: False)
  monkeypatch.setattr(choices, "_served", lambda values, k: False)


def test_interpreted_models_that_share_a_program_are_right(monkeypatch):
  interpreted(monkeypatch)
  cases = [Case((20, 3), 24, 40, seed=n, block=16) for n in range(2)]

  def call(x, w, groups, dy):
    y, pull = jax.vjp(
      lambda x, w: grouped_matmul(x, w, groups, implementation="triton"), x, w
    )
    return y, *pull(dy)

  groups = jax.tree.map(lambda *x: jnp.stack(x), *(c.groups for c in cases))
  operands = [jnp.stack([getattr(c, n) for c in cases]) for n in ("x", "w", "dy")]
  with devices.as_if("ampere"):
    found = jax.vmap(call)(operands[0], operands[1], groups, operands[2])
  for n, case in enumerate(cases):
    case.bias = jnp.zeros_like(case.bias)
    *_, db = expected(case)
    check(case, [*(x[n] for x in found), db.astype(jnp.bfloat16)])


@pytest.mark.parametrize("limited", [False, True], ids=["dropless", "capacity"])
def test_an_interpreted_layer_is_that_of_a_cpu(limited, monkeypatch):
  """Values and all gradients, with biases; the dropless one under scan and remat."""
  import jmoe

  interpreted(monkeypatch)
  limit = dict(capacity_factor=1.0) if limited else {}
  config = jmoe.simple(24, 40, num_experts=4, k=2, gated=False, bias=True, **limit)
  params = jmoe.moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (50, 24))

  def differentiated(params, x):
    def loss(params, x):
      def step(x, _=None):
        return x + jmoe.moe(params, x, config, train=True)[0], None

      if limited:
        return jnp.sum(jnp.sin(step(x)[0]))
      return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(step), x, None, length=2)[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  with devices.as_if("ampere"):
    traced = jax.jit(differentiated).trace(params, x)
    assert "pallas_call" in str(traced.jaxpr)
    found = traced.lower().compile()(params, x)
  with devices.as_if("cpu"):
    wanted = jax.jit(lambda *a: differentiated(*a))(params, x)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    scale = max(1.0, float(jnp.abs(other).max()))
    assert_close(one / scale, other / scale)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
@pytest.mark.parametrize("axes", [("data",), ()], ids=["split", "all_the_same"])
def test_layers_trace_for_triton_inside_shard_map(axes):
  import jmoe

  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  config = jmoe.simple(256, 384, num_experts=8, k=2)
  params = jmoe.moe_init(jax.random.key(0), config)
  spec = jax.sharding.PartitionSpec

  def layer(params, x):
    return jmoe.moe(params, x[0], config)[0][None]

  split = jax.shard_map(
    layer, mesh=mesh, in_specs=(spec(), spec(*axes)), out_specs=spec(*axes)
  )
  x = jnp.ones((8, 300, 256))
  with devices.as_if("ampere"):
    grad = jax.grad(lambda params, x: jnp.sum(split(params, x)))
    text = str(jax.jit(grad).trace(params, x).jaxpr)
  assert text.count("name=grouped_matmul") >= 9 and ("psum" in text) == bool(axes)


def products(function, *operands):
  """How each tile's product is to be made, from the traced kernels."""
  text = str(jax.jit(function).trace(*operands).jaxpr)
  return set(re.findall(r"precision=(\([^)]*\)|\S+)", text))


@pytest.mark.parametrize(
  ("asked", "made"),
  [
    (None, "(Precision.HIGHEST, Precision.HIGHEST)"),
    ("default", "(Precision.HIGHEST, Precision.HIGHEST)"),
    ("float32", "(Precision.HIGHEST, Precision.HIGHEST)"),
    ("high", "TF32_TF32_F32_X3"),
    ("tensorfloat32", "TF32_TF32_F32"),
  ],
)
def test_float32_is_multiplied_as_such_unless_jax_was_told_otherwise(asked, made):
  from jmoe.kernels.grouped_matmul.triton import matrices, rows

  case = Case((3, 9), 32, 64, block=16, dtype=jnp.float32)
  with jax.default_matmul_precision(asked):
    for function, operands in (
      (lambda x, w: rows(x, w, case.groups), (case.x, case.w)),
      (lambda x, y: matrices(x, y, case.groups), (case.x, case.dy)),
    ):
      assert products(function, *operands) == {made}
  narrow = case.x.astype(jnp.bfloat16), case.w.astype(jnp.bfloat16)
  with jax.default_matmul_precision(asked):
    how = products(lambda x, w: rows(x, w, case.groups), *narrow)
  assert how == {"(Precision.DEFAULT, Precision.DEFAULT)"}


@contextlib.contextmanager
def in_view_of(gpu):
  """A jax that asks for which GPU it lowers is told."""
  if jax.__version_info__ < (0, 11):
    yield
    return
  from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

  device = AbstractDevice(gpu, None, "gpu")
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    yield


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth, width", [(512, 768), (61, 40)])
def test_products_and_gradients_lower_for_cuda(dtype, depth, width):
  case = Case((300, 0, 128), depth, width, dtype=dtype, block=64)
  with in_view_of("NVIDIA A100"):
    lowered = jax.jit(lambda: run(case)).trace().lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3


def test_triton_is_refused_where_it_cannot_serve():
  case = Case((3,), 8, 8, block=16)
  matmul = functools.partial(grouped_matmul, case.x, case.w, implementation="triton")
  with pytest.raises(ValueError, match="'triton' cannot serve, this is no NVIDIA GPU"):
    matmul(case.groups)
  narrow = Groups(case.groups.start, case.groups.rows, 8)
  with devices.as_if("ampere"):
    with pytest.raises(ValueError, match="aligned to 8 rows, not to 16"):
      matmul(narrow)


# Tests on a GPU of compute capability 8.0 or more.  On an H100 too the table is made to
# choose Triton there.

CLOSE = {"float32": 5e-6, "bfloat16": 4e-3, "float16": 1e-3}  # TF32 would be at 3e-4


def near(case, found):
  """Against float64: norm of the difference over the norm."""
  limit = CLOSE[jnp.dtype(case.x.dtype).name]
  found = [np.asarray(a, np.float64) for a in found]
  found[:2] = (a[case.real] for a in found[:2])
  for one, other in zip(found, case.expected(), strict=True):
    assert error(one, other) < limit
  assert not found[2][np.asarray(case.groups.rows) == 0].any()


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_products_and_gradients_are_right_on_a_gpu(name, dtype):
  case = of(*(LARGE | SMALL)[name], dtype=dtype)
  near(case, jax.jit(lambda: run(case))())


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_can_be_asked_for_on_a_gpu(dtype):
  case = Case((130, 0, 777, 1), 512, 384, dtype=dtype)  # as a Hopper aligns it

  def call(x, w, b):
    y, pull = jax.vjp(
      lambda *a: grouped_matmul(*a[:2], case.groups, a[2], implementation="triton"),
      *(x, w, b),
    )
    return y, *pull(case.dy)

  near(case, jax.jit(call)(case.x, case.w, case.bias))


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits_whatever_was_in_memory(dtype):
  case = Case((130, 0, 777, 1), 512, 384, dtype=dtype, block=64)
  step = jax.jit(lambda: run(case))
  first = [np.asarray(x) for x in step()]
  poison = jnp.full((1 << 28,), jnp.nan, jnp.bfloat16).block_until_ready()
  del poison
  for one, other in zip(first, step(), strict=True):
    rows = case.real if one.shape[0] == len(case.real) else slice(None)
    np.testing.assert_array_equal(one[rows], np.asarray(other)[rows])


@pytest.mark.accelerator
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("under", ["jit", "remat", "vmap"])
def test_a_layer_by_triton_is_that_of_a_cpu(limited, under):
  """In float32 both; the same choices are replayed."""
  import jmoe

  limit = dict(capacity_factor=1.5) if limited else {}
  config = jmoe.simple(256, 384, num_experts=8, k=2, **limit)
  params = jmoe.moe_init(jax.random.key(0), config)
  x = jax.random.normal(jax.random.key(1), (1000, 256))
  forced = jax.lax.top_k(jax.random.uniform(jax.random.key(2), (1000, 8)), 2)[1]

  def grads(params, x, forced):
    def loss(params, x):
      y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
      return jnp.sum(jnp.sin(y))

    call = jax.checkpoint(loss) if under == "remat" else loss
    return jax.value_and_grad(call, argnums=(0, 1))(params, x)

  with devices.as_if("ampere"):
    if under == "vmap":
      many = jax.tree.map(lambda a: jnp.stack([a, a]), (params, x, forced))
      found = jax.tree.map(lambda a: a[1], jax.jit(jax.vmap(grads))(*many))
    else:
      found = jax.jit(grads)(params, x, forced)
  cpu = jax.devices("cpu")[0]
  args = jax.tree.map(lambda a: jax.device_put(np.asarray(a), cpu), (params, x, forced))
  with jax.default_device(cpu), devices.as_if("cpu"):
    wanted = jax.jit(lambda *a: grads(*a))(*args)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-5
