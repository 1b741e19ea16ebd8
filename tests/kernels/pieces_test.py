"""Large arrays of a sparse layer on Hopper made in pieces: the same layer."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.kernels import devices, pieces
from jmoe.types import Groups
from jmoe.use import use
from tests.kernels.hopper_cases import (
  as_hopper as as_hopper,
  error,
  hopper,
  lowers,
  on_cpu,
)

D, F = 256, 256
LOADS = (4, 130)  # the second one's blocks lie on both sides of the cut
T, E = sum(LOADS), len(LOADS)


def config(d_ff=F, **keywords):
  base = jmoe.simple(D, F, num_experts=E, k=1)
  experts = use(jmoe.experts.glu, d_ff=d_ff, **keywords)
  return dataclasses.replace(base, experts=experts)


def grads(config):
  forced = jnp.repeat(jnp.arange(E), jnp.asarray(LOADS), total_repeat_length=T)[:, None]

  def call(params, x):
    def loss(params, x):
      y, _ = jmoe.moe(params, x, config, forced=forced, train=True)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, found

  return call


def operands(config, dtype=jnp.bfloat16):
  params = jmoe.moe_init(jax.random.key(0), config)
  experts = jax.tree.map(lambda a: a.astype(dtype), params["experts"])
  for n, (name, a) in enumerate(experts.items()):  # biases start at zero
    noise = jax.random.normal(jax.random.key(n + 2), a.shape, dtype)
    experts[name] = a + 0.1 * noise if "bias" in name else a
  x = jax.random.normal(jax.random.key(1), (T, D), dtype)
  return {**params, "experts": experts}, x


@on_cpu
def test_an_interpreted_layer_in_pieces_is_that_of_a_cpu(as_hopper):
  """Values and all gradients; blocks that no kernel writes hold NaN here."""
  made = config(pieces=2, bias=True)
  given = operands(made)
  found = jax.jit(grads(made))(*given)
  with devices.as_if("cpu"):
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
    expected = jax.jit(grads(made))(*wide)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert error(one, np.asarray(other, np.float64)) < 2e-2


def kernels(made, tokens=300):
  """The text of a layer and its gradients, lowered as for a Hopper GPU."""
  params, _ = jax.eval_shape(lambda: operands(made))
  x = jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16)

  def loss(params, x):
    y, _ = jmoe.moe(params, x, made, train=True)
    return jnp.sum(y.astype(jnp.float32))

  with hopper():
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@lowers
def test_pieces_lower_for_cuda_and_are_written_in_place():
  """One more of hidden, down, back and d down; of the second ones all but down."""
  text = kernels(config(pieces=2))
  assert text.count("@mosaic_gpu") == 7 + 4
  calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
  assert sum("output_operand_alias<" in call for call in calls) == 4


def test_no_pieces_are_refused_on_any_device():
  with pytest.raises(ValueError, match="pieces=0; give None or 1, 2"):
    config(pieces=0)


@lowers
def test_pieces_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match="pieces=3; .* have at most 2"):
    kernels(config(pieces=3))
  with pytest.raises(ValueError, match="d_ff=200 must be multiples of 64"):
    kernels(config(200, pieces=2))


@pytest.mark.parametrize("total, n", [(2880, 2), (768, 3), (320, 2), (64, 1)])
def test_columns_are_all_there_and_of_whole_tiles(total, n):
  found = pieces.columns(total, n, tile=128)
  ends = [at.first + at.size for at in found]
  assert [at.first for at in found] == [0, *ends[:-1]] and ends[-1] == total
  assert len(found) <= n and all(end % 128 == 0 for end in ends[:-1])
  assert len(found) == 1 or min(at.size for at in found) >= 128


def test_pieces_are_put_side_by_side_under_vmap_too():
  whole = jnp.arange(24.0).reshape(2, 3, 4)

  def joined(a):
    one, two = pieces.Columns(0, 3, 4), pieces.Columns(3, 1, 4)
    return pieces.put(pieces.put(None, a[:, :3], one), a[:, 3:], two)

  assert (jax.vmap(joined)(whole) == whole).all() and (
    joined(whole[0]) == whole[0]
  ).all()
  assert "scatter" not in str(jax.make_jaxpr(jax.vmap(joined))(whole))


def test_a_part_finds_its_rows_of_each_expert():
  """One on both sides of the cut, one before it, one after it, and an empty one."""
  part = pieces.Part(256, 256, 512)
  groups = Groups(jnp.asarray([0, 128, 384, 512]), jnp.asarray([5, 200, 9, 0]), 128)
  found = part.groups(groups)
  assert found.rows.tolist() == [0, 72, 9, 0] and found.start.tolist()[1:3] == [0, 128]
  # of two models, whose parts and buffers lie one behind the other
  rows = jnp.asarray([0, 255, 256, 511])
  assert part.in_whole(rows).tolist() == [256, 511, 768, 1023]
