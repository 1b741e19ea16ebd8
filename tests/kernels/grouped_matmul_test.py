"""Every implementation against the reference: values, gradients, what nobody owns."""
# SPDX-License-Identifier: Apache-2.0

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.kernels import grouped_ffn, grouped_matmul
from jmoe.kernels.grouped_ffn import reference as ffn_reference
from jmoe.kernels.grouped_matmul import reference
from jmoe.kernels.grouped_matmul.reference import expert_of_rows
from jmoe.types import Groups, Rows
from jmoe.use import use
from tests.tolerance import assert_close

# The package of the same name is hidden behind the function.
API = importlib.import_module("jmoe.kernels.grouped_matmul.api")
D, F, E, R = 6, 10, 5, 72
LOADS = {
  "mixed": (5, 0, 17, 8, 3),
  "one expert": (0, 0, 40, 0, 0),
  "nothing": (0, 0, 0, 0, 0),
  "whole blocks": (8, 8, 16, 8, 8),
}
IMPLEMENTATIONS = ("blocks", "batched", "ragged_dot")


def groups_of(loads, *, equal: bool, block: int = 8) -> Groups:
  rows = np.asarray(loads, np.int32)
  if equal:
    start = np.arange(len(rows), dtype=np.int32) * 8
    return Groups(jnp.asarray(start), jnp.asarray(np.minimum(rows, 8)), block, 8)
  padded = -(-rows // block) * block
  return Groups(
    jnp.asarray(np.cumsum(padded) - padded, jnp.int32), jnp.asarray(rows), block
  )


def operands(dtype, seed=0, bias=True):
  keys = jax.random.split(jax.random.key(seed), 6)
  x = jax.random.normal(keys[0], (R, D), dtype)
  w = jax.random.normal(keys[1], (E, D, F), dtype)
  b = jax.random.normal(keys[2], (E, F), dtype) if bias else None
  return x, w, b, jax.random.normal(keys[3], (R, F), dtype)


def owned(groups) -> jax.Array:
  return (expert_of_rows(groups, R) >= 0)[:, None]


@functools.cache
def differentiated(function):
  """(groups, x, w, b, dy) -> values of owned rows and all gradients, compiled once.

  Padding rows are zero and have no gradient, as in the layer.
  """

  @jax.jit
  def run(groups, x, w, b, dy):
    real = owned(groups)
    x, dy = jnp.where(real, x, 0), jnp.where(real, dy, 0)
    y, pull = jax.vjp(lambda x, w, b: function(x, w, groups, b), x, w, b)
    dx, dw, db = pull(dy)
    return jnp.where(real, y, 0), jnp.where(real, dx, 0), dw, db

  return run


def implemented(name: str):
  return use(grouped_matmul, implementation=name, allow_dense=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_the_reference_forward_and_backward(name, loads, dtype):
  groups = groups_of(LOADS[loads], equal=name == "batched")
  x, w, b, dy = operands(jnp.dtype(dtype))
  found = differentiated(implemented(name))(groups, x, w, b, dy)
  wide = [a.astype(jnp.float32) for a in (x, w, b, dy)]
  expected = differentiated(reference)(groups, *wide)
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == jnp.dtype(dtype)
    scale = max(1.0, float(jnp.abs(other).max()))  # sums of products, not entries
    assert_close(one / jnp.asarray(scale, one.dtype), other / scale)


@pytest.mark.parametrize("name", ["blocks", "ragged_dot"])
def test_what_nobody_owns_never_reaches_what_somebody_does(name):
  groups = groups_of(LOADS["mixed"], equal=False)
  x, w, _, dy = operands(jnp.float32)
  end = int(groups.start[-1]) + 8
  tail = (jnp.arange(R) >= end)[:, None]  # after the last expert's last block
  clean = jnp.where(owned(groups), x, 0)
  matmul = implemented(name)

  @jax.jit
  def run(x, dy):
    y, pull = jax.vjp(lambda x, w: matmul(x, w, groups), x, w)
    return jnp.where(owned(groups), y, 0), pull(jnp.where(owned(groups), dy, 0))[1]

  for one, other in zip(
    run(clean, dy), run(jnp.where(tail, 7e3, clean), dy), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  if name == "blocks":  # its loops do not even read the tail
    poisoned = run(jnp.where(tail, jnp.nan, clean), dy)
    for one, other in zip(run(clean, dy), poisoned, strict=True):
      np.testing.assert_array_equal(one, other)


def test_matrices_may_belong_to_the_first_experts_only():
  groups = groups_of(LOADS["mixed"], equal=False)
  x, w, b, _ = operands(jnp.float32)
  first = expert_of_rows(groups, R)[:, None] < 3
  x = jnp.where(owned(groups), x, 0)
  some = grouped_matmul(x, w[:3], groups, b[:3])
  every = grouped_matmul(x, w, groups, b)
  real = owned(groups) & first
  np.testing.assert_array_equal(jnp.where(real, some, 0), jnp.where(real, every, 0))


def test_a_dense_product_is_refused_unless_asked_for():
  groups = groups_of(LOADS["mixed"], equal=False)
  x, w, _, _ = operands(jnp.float32)
  with pytest.raises(ValueError, match="allow_dense=True"):
    grouped_matmul(x, w, groups, implementation="ragged_dot")
  with pytest.raises(ValueError, match="did you mean 'blocks'"):
    grouped_matmul(x, w, groups, implementation="block")
  with pytest.raises(ValueError, match="equal groups"):
    grouped_matmul(x, w, groups, implementation="batched")


def test_the_choice_is_said_once(caplog):
  groups = groups_of(LOADS["mixed"], equal=False)
  x, w, _, _ = operands(jnp.float32)
  API._said.clear()
  with caplog.at_level("INFO", logger="jmoe"):
    grouped_matmul(x, w, groups)
    grouped_matmul(x, w, groups)
  assert [r.message for r in caplog.records] == [
    "grouped matmul on cpu: blocks (only rows that exist are multiplied)"
  ]


HIDDEN = {1: jnp.sin, 2: lambda g, h: jnp.tanh(g) * h}


@functools.cache
def differentiated_ffn(ups: int, fused: bool, keep: str = "hidden"):
  @jax.jit
  def run(groups, x, matrices, down, dy, weight):
    real = owned(groups)
    x, dy = jnp.where(real, x, 0), jnp.where(real, dy, 0)

    def function(x, matrices, down, weight):
      if fused:
        rows = Rows(x, groups, weight=weight)
        return grouped_ffn(rows, matrices, down, HIDDEN[ups], keep=keep)
      y = ffn_reference(x, matrices, down, groups, HIDDEN[ups], reference)
      return y if weight is None else y * weight[:, None]

    y, pull = jax.vjp(function, x, matrices, down, weight)
    dx, d_matrices, d_down, d_weight = pull(dy)
    if weight is not None:
      d_weight = jnp.where(real[:, 0], d_weight, 0)
    return jnp.where(real, y, 0), jnp.where(real, dx, 0), d_matrices, d_down, d_weight

  return run


# input matrices, a weight for each row, a bias behind the last matrix, what is kept
FORMS = {
  "one": (1, False, True, "hidden"),
  "two": (2, False, True, "hidden"),
  "one, weighed": (1, True, True, "hidden"),
  "two, weighed": (2, True, False, "hidden"),
  "two, weighed, made anew": (2, True, True, "inputs"),
}


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("form", FORMS)
def test_the_fused_feed_forward_equals_its_parts(form, loads):
  ups, weighed, biased, keep = FORMS[form]
  groups = groups_of(LOADS[loads], equal=False)
  x, w, b, _ = operands(jnp.float32)
  w2 = operands(jnp.float32, seed=1)[1]
  down = jax.random.normal(jax.random.key(9), (E, F, D)), b[:, :D] if biased else None
  matrices = ((w, b), (w2, None))[:ups]
  weight = jax.random.normal(jax.random.key(8), (len(x),)) if weighed else None
  given = groups, x, matrices, down, x[::-1], weight
  fused = differentiated_ffn(ups, True, keep)(*given)
  parts = differentiated_ffn(ups, False)(*given)
  for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(parts), strict=True):
    scale = max(1.0, float(jnp.abs(other).max()))  # sums of products, not entries
    assert_close(one / scale, other / scale)
