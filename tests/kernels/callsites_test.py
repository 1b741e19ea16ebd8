"""`jmoe.ragged_dot` in the forms in which other projects call jax's; docs/kernels.md.

The calls are written after MaxText, Levanter and Tunix as they were read there; each is
made once with jax's function and once with this one.
"""
# SPDX-License-Identifier: Apache-2.0

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jmoe
from tests.tolerance import assert_close

T, K, D, F, E = 24, 2, 16, 12, 4


def maxtext(ragged_dot, x_ND, w_EDF, sizes_E, *, dtype):
  """layers/moe.py: everything by name, in a context of metadata, rows padded."""
  from jax.experimental.xla_metadata import set_xla_metadata

  x_ND = jnp.pad(x_ND.astype(dtype), ((0, 8), (0, 0)))
  with set_xla_metadata(ragged_dot_tiling="56,16,12", mosaic_fusion_group="0"):
    y_NF = ragged_dot(
      lhs=x_ND,
      rhs=w_EDF.astype(dtype),
      group_sizes=sizes_E,
      preferred_element_type=dtype,
    )
  return y_NF[: x_ND.shape[0] - 8]


def maxtext_batchsplit(ragged_dot, x_ND, w_EDF, sizes_E, *, dtype):
  """models/deepseek_batchsplit.py: a partial call that is differentiated by hand."""

  @jax.custom_vjp
  def masked(x, w, sizes):
    return forward(x, w, sizes)[0]

  def forward(x, w, sizes):
    y, pull = jax.vjp(
      functools.partial(
        ragged_dot,
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=dtype,
        group_sizes=sizes,
      ),
      x,
      w,
    )
    real = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    return jnp.where(real, y, 0), (real, pull)

  def backward(kept, dy):
    real, pull = kept
    dx, dw = pull(dy)
    return jnp.where(real, dx, 0), dw, None

  masked.defvjp(forward, backward)
  return masked(x_ND.astype(dtype), w_EDF.astype(dtype), sizes_E)


def levanter(ragged_dot, x_ND, w_EDF, sizes_E, *, dtype):
  """grug/_moe/scatter.py: by position; rows of invalid tokens are after the last group
  and weigh nothing.
  """
  y_NF = ragged_dot(x_ND.astype(dtype), w_EDF.astype(dtype), sizes_E)
  real = jnp.arange(x_ND.shape[0])[:, None] < jnp.sum(sizes_E)
  return jnp.where(real, y_NF, 0)


def tunix(ragged_dot, x_ND, w_EDF, sizes_E, *, dtype):
  """models/gemma4/moe.py: sizes by name; only the matrices are cast."""
  real = jnp.arange(x_ND.shape[0])[:, None] < jnp.sum(sizes_E)
  y_NF = ragged_dot(x_ND, w_EDF.astype(dtype), group_sizes=sizes_E)
  return jnp.where(real, y_NF, 0)


CALLS = (maxtext, maxtext_batchsplit, levanter, tunix)
SIZES = (3, 0, 30, 7)  # the last rows are of no group


def operands():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (T * K, D))
  w = jax.random.normal(keys[1], (E, D, F)) / 4
  return x, w, jax.random.normal(keys[2], (T * K, F))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def both(call, ragged_dot, dtype, x, w, dy, sizes):
  y, pull = jax.vjp(lambda x, w: call(ragged_dot, x, w, sizes, dtype=dtype), x, w)
  rows = (jnp.arange(len(x)) < sizes.sum())[:, None]
  return jnp.where(rows, y, 0), *pull(jnp.where(rows, dy, 0).astype(y.dtype))


@pytest.mark.contract
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_call_gives_what_jax_gives(call, dtype):
  given_operands = *operands(), jnp.asarray(SIZES, jnp.int32)
  found = both(call, jmoe.ragged_dot, dtype, *given_operands)
  given = both(call, jax.lax.ragged_dot, dtype, *given_operands)
  exact = both(call, jax.lax.ragged_dot, jnp.float32, *given_operands)
  for one, other, right in zip(found, given, exact, strict=True):
    assert one.dtype == other.dtype
    gap = jnp.linalg.norm(one.astype(jnp.float32) - right)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    assert gap <= tolerance * jnp.linalg.norm(right)


@pytest.mark.parametrize("call", CALLS)
def test_the_call_works_in_a_shard_of_a_mesh(call):
  x, w, _ = operands()
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((4,), ("expert",), axis_types=auto)
  many = jnp.stack([x + n for n in range(4)])
  sizes = jnp.asarray([SIZES, (20, 0, 17, 11), (0, 0, 0, 0), SIZES], jnp.int32)

  def body(x, w, sizes):
    return call(jmoe.ragged_dot, x[0], w, sizes[0], dtype=jnp.float32)[None]

  split = jax.shard_map(
    body, mesh=mesh, in_specs=(P("expert"), P(), P("expert")), out_specs=P("expert")
  )
  whole = jax.jit(lambda x, s: call(jax.lax.ragged_dot, x, w, s, dtype=jnp.float32))
  found = jax.jit(split)(many, w, sizes)
  for n, x in enumerate(many):
    real = int(sizes[n].sum())
    assert_close(found[n, :real], whole(x, sizes[n])[:real])


@pytest.mark.parametrize(
  ("lhs", "rhs", "preferred"),
  [
    (jnp.float32, jnp.bfloat16, None),
    (jnp.bfloat16, jnp.float32, None),
    (jnp.float32, jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.bfloat16),
  ],
)
def test_dtypes_that_differ_are_taken_as_jax_takes_them(lhs, rhs, preferred):
  x, w, dy = operands()
  sizes = jnp.asarray(SIZES, jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(function):
    y, pull = jax.vjp(
      lambda x, w: function(x, w, sizes, preferred_element_type=preferred),
      x.astype(lhs),
      w.astype(rhs),
    )
    real = (jnp.arange(len(x)) < sizes.sum())[:, None]
    return jnp.where(real, y, 0), *pull(jnp.where(real, dy, 0).astype(y.dtype))

  for one, other in zip(run(jmoe.ragged_dot), run(jax.lax.ragged_dot), strict=True):
    assert one.dtype == other.dtype
    gap = jnp.linalg.norm((one - other).astype(jnp.float32))
    assert gap <= 1e-2 * jnp.linalg.norm(other.astype(jnp.float32))


def test_quantised_matrices_are_refused_in_one_line():
  x, w, _ = operands()
  sizes = jnp.asarray(SIZES, jnp.int32)
  with pytest.raises(ValueError, match="lhs is bfloat16 and rhs int8") as caught:
    maxtext(
      lambda rhs, **named: jmoe.ragged_dot(rhs=rhs.astype(jnp.int8), **named),
      x,
      w,
      sizes,
      dtype=jnp.bfloat16,
    )
  assert "\n" not in str(caught.value)
