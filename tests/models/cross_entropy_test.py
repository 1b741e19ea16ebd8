"""The loss in chunks equals the loss of all logits, which never exist."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models import Decoder, cross_entropy
from tests import jaxprs
from tests.losses.contract_test import enable_x64
from tests.tolerance import assert_close

pytestmark = pytest.mark.contract

T, D, V = 50, 16, 33


def drawn(dtype="float32", num_tokens=T, seed=0):
  """(x, matrix, target, weight); a fifth of the tokens weighs nothing."""
  random = np.random.default_rng(seed)
  x_TD = random.normal(size=(num_tokens, D))
  matrix_DV = random.normal(size=(D, V)) * D**-0.5
  weight_T = random.random(num_tokens) * (random.random(num_tokens) > 0.2)
  return (
    jnp.asarray(x_TD, dtype),
    jnp.asarray(matrix_DV, dtype),
    jnp.asarray(random.integers(0, V, num_tokens), jnp.int32),
    jnp.asarray(weight_T, jnp.float32),
  )


def expected(x, matrix, target, weight, z_loss=0.0):
  """(loss, nats, gradients of x, matrix and weight), by NumPy in float64."""
  x, matrix, weight = (np.asarray(a).astype(np.float64) for a in (x, matrix, weight))
  target = np.asarray(target)
  logits = x @ matrix
  top = logits.max(1, keepdims=True)
  log_sum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
  each = log_sum - logits[np.arange(len(x)), target]
  cost = each + z_loss * log_sum**2
  slope = np.exp(logits - log_sum[:, None]) * (1 + 2 * z_loss * log_sum)[:, None]
  slope[np.arange(len(x)), target] -= 1
  slope *= weight[:, None]
  counts = weight != 0
  return (
    np.sum(weight * cost),
    each * counts,
    (slope @ matrix.T, x.T @ slope, cost * counts),
  )


def value_and_grad(operands, **keywords):
  x, matrix, target, weight = operands

  @jax.jit
  def run(x, matrix, weight):
    def loss(x, matrix, weight):
      return cross_entropy(x, matrix, target, weight, **keywords)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, matrix, weight)

  (loss, nats), grads = run(x, matrix, weight)
  return loss, nats, grads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [None, 10, 16])  # whole, divides, leaves a rest
def test_equals_the_loss_of_all_logits(dtype, chunk):
  operands = drawn(dtype)
  loss, nats, grads = value_and_grad(operands, z_loss=0.1, chunk=chunk)
  wanted, each, slopes = expected(*operands, z_loss=0.1)
  assert_close(loss, np.float32(wanted))
  assert_close(nats, each.astype(np.float32))
  for found, slope, like in zip(grads, slopes, (*operands[:2], operands[3])):
    assert found.dtype == like.dtype
    assert_close(found, slope.astype(like.dtype))
  (primal, same), _ = jax.vjp(lambda x: cross_entropy(x, *operands[1:]), operands[0])
  assert primal.dtype == same.dtype == jnp.float32


def test_is_as_exact_as_its_operands():
  with enable_x64():
    operands = [x.astype(jnp.float64) if x.dtype == jnp.float32 else x for x in drawn()]
    loss, nats, grads = value_and_grad(operands, z_loss=0.1, chunk=16)
    wanted, each, slopes = expected(*operands, z_loss=0.1)
    assert_close(loss, wanted)
    assert_close(nats, each)
    for found, slope in zip(grads, slopes):
      assert_close(found, slope)


def test_large_logits_overflow_nowhere():
  x, matrix, target, weight = drawn()
  loss, _, grads = value_and_grad((x * 1e3, matrix, target, weight), chunk=16)
  wanted, _, slopes = expected(x * 1e3, matrix, target, weight)
  assert_close(loss, np.float32(wanted))
  for found, slope in zip(grads, slopes):
    assert np.all(np.isfinite(found))
    size = np.abs(slope).max()
    assert_close(np.asarray(found) / size, (slope / size).astype(np.float32))


def test_whatever_ignored_tokens_hold_changes_nothing():
  x, matrix, target, weight = drawn()
  ignored = np.asarray(weight) == 0
  loss, nats, grads = value_and_grad((x, matrix, target, weight), chunk=16)
  x = jnp.where(ignored[:, None], jnp.nan, x)
  target = jnp.where(ignored, -100, target)
  again, same, slopes = value_and_grad((x, matrix, target, weight), chunk=16)
  assert loss == again and not np.any(np.asarray(nats)[ignored])
  np.testing.assert_array_equal(nats, same)
  for a, b in zip(grads, slopes):
    np.testing.assert_array_equal(a, b)
  assert not np.any(np.asarray(grads[0])[ignored])


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_outside_the_vocabulary_makes_no_number(target):
  x, matrix, targets, weight = drawn()
  place = int(np.argmax(weight))
  loss, _ = cross_entropy(x, matrix, targets.at[place].set(target), weight, chunk=16)
  assert math.isnan(loss)


def test_the_gradient_is_scaled_by_what_follows_and_vmapped():
  operands = [drawn(seed=seed) for seed in (0, 1)]
  x, matrix, target, weight = jax.tree.map(lambda *a: jnp.stack(a), *operands)

  @jax.jit
  @jax.vmap
  def slopes(x, matrix, target, weight):
    def loss(x, matrix):
      return 3 * cross_entropy(x, matrix, target, weight, chunk=16)[0]

    return jax.grad(loss, (0, 1))(x, matrix)

  for n, found in enumerate(zip(*slopes(x, matrix, target, weight))):
    _, _, wanted = expected(*operands[n])
    for a, b in zip(found, wanted):
      assert_close(a, (3 * b).astype(np.float32))


def test_no_array_holds_the_logits_of_all_tokens():
  x, matrix, target, weight = drawn(num_tokens=96)

  def step(x, matrix, weight):
    loss = functools.partial(cross_entropy, chunk=16)
    return jax.grad(lambda *a: loss(*a[:2], target, a[2])[0], (0, 1, 2))(
      x, matrix, weight
    )

  made = list(jaxprs.arrays(jax.make_jaxpr(step)(x, matrix, weight)))
  sizes = [math.prod(a.shape) for a in made]
  assert max(sizes) == 96 * D, max(made, key=lambda a: math.prod(a.shape))
  assert 16 * V in sizes  # the logits of a chunk


def test_memory_is_that_of_a_chunk():
  T, D, V, chunk = 4096, 8, 1024, 128
  like = jax.ShapeDtypeStruct
  arrays = like((T, D), jnp.float32), like((D, V), jnp.float32)
  each = like((T,), jnp.int32), like((T,), jnp.float32)

  def temporary(chunk):
    def loss(x, matrix, target, weight):
      return cross_entropy(x, matrix, target, weight, chunk=chunk)[0]

    step = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays, *each).compile()
    return step.memory_analysis().temp_size_in_bytes, step.as_text()

  used, text = temporary(chunk)
  assert used < 4 * 4 * chunk * V + 4 * 4 * (T * D + D * V)
  assert f"[{chunk},{V}]" in text and f"[{T},{V}]" not in text
  assert f"[{T // chunk},{chunk},{V}]" not in text
  whole, text = temporary(T)
  assert whole > 4 * T * V and f"[{T},{V}]" in text


@pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
def test_a_decoder_has_the_loss_of_its_logits(tied, dtype):
  block = BlockConfig(Attention(num_heads=2), Dense(d_ff=8))
  config = ModelConfig(V, D, segments=(((block,), 1),), tied=tied, dtype=dtype)
  graph, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
  random = np.random.default_rng(0)
  tokens_BS, target_BS = random.integers(0, V, (2, 3, 7)).astype(np.int32)
  weight_BS = (random.random((3, 7)) > 0.3).astype(np.float32)

  def logged(state):
    logits_BSV, _ = nnx.merge(graph, state)(tokens_BS)
    log_BSV = jax.nn.log_softmax(logits_BSV)
    picked_BS = jnp.take_along_axis(log_BSV, target_BS[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked_BS * weight_BS)

  def chunked(state):
    model = nnx.merge(graph, state)
    x_BSD, _ = model.hidden(tokens_BS)
    assert x_BSD.dtype == config.dtype
    return model.cross_entropy(x_BSD, target_BS, weight_BS, chunk=8)[0]

  # Jax's gradient of attention mixes bfloat16 and float32.
  with jax.numpy_dtype_promotion("standard"):
    wanted, found = (jax.jit(jax.value_and_grad(f))(state) for f in (logged, chunked))
  jax.tree.map(lambda a, b: assert_close(b.astype(dtype), a), wanted, found)


def test_bad_calls_are_refused_in_one_line():
  x, matrix, target, weight = drawn()
  with pytest.raises(ValueError, match=r"x\(50, 16\).*\(49,\)") as said:
    cross_entropy(x, matrix, target[1:], weight)
  assert "\n" not in str(said.value)
  for chunk in (0, -1, 2.5, True):
    with pytest.raises(ValueError, match="chunk=.*positive integer"):
      cross_entropy(x, matrix, target, weight, chunk=chunk)


def test_a_repeated_segment_is_refused_where_something_comes_before_blocks():
  block = BlockConfig(Attention(num_heads=2), Dense(d_ff=8))
  config = ModelConfig(V, D, segments=(((block,), 2),))
  assert dataclasses.replace(config, remat=("hidden",)).remat == ("hidden",)
  model = Decoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="unrolled"):
    model.hidden(jnp.zeros((1, 2), jnp.int32), before=lambda n, p, x: (p, x))
