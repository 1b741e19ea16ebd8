"""Attention: which implementation serves, and that batching it changes nothing."""
# SPDX-License-Identifier: Apache-2.0

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import Attention, BlockConfig, Dense, ModelConfig
from jmoe.models import attention as module

HOPPER = types.SimpleNamespace(compute_capability="9.0")


def arrays(rows=2, seq=8, heads=4, kv_heads=2, width=8, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(rows, seq, n, width) for n in (heads, kv_heads, kv_heads)]
  qkv = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
  return *qkv, jnp.array([[1] * 3 + [2] * (seq - 4) + [0]] * rows, jnp.int32)


@pytest.fixture
def on_gpu(monkeypatch):
  """A device table that says: one Hopper GPU."""
  monkeypatch.setattr(module, "current_device", lambda: "gpu")
  monkeypatch.setattr(module.jax, "devices", lambda: [HOPPER])


@pytest.mark.parametrize(
  ("capability", "change", "reason"),
  [
    ("7.5", {}, "compute capability 7.5"),
    (None, {}, "no NVIDIA GPU"),
    ("9.0", {"dtype": jnp.float32}, "the dtype is float32"),
    ("9.0", {"width": 12}, "head_dim=12"),
    ("9.0", {"width": 136}, "head_dim=136"),
    ("9.0", {"seq": 7}, "7 queries to 7 keys"),
  ],
)
def test_what_cudnn_cannot_do_is_done_by_xla_and_said(
  monkeypatch, on_gpu, capability, change, reason
):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(module.jax, "devices", lambda: [device])
  q, k, *_ = arrays(**{"dtype": jnp.bfloat16, **change})
  name, why = module.choose(None, q, k)
  assert name == "xla" and reason in why
  with pytest.raises(ValueError, match="implementation='cudnn' cannot serve") as caught:
    module.choose("cudnn", q, k)
  assert reason in str(caught.value)


def test_a_gpu_gets_cudnn_unless_xla_is_asked_for(on_gpu):
  q, k, *_ = arrays(dtype=jnp.bfloat16)
  assert module.choose(None, q, k)[0] == "cudnn"
  assert module.choose("xla", q, k)[0] == "xla"


def test_a_cpu_gets_xla():
  q, k, *_ = arrays(dtype=jnp.bfloat16)
  assert module.choose(None, q, k) == ("xla", "the device is cpu")


@pytest.mark.parametrize("is_causal", [True, False])
def test_models_that_share_a_program_attend_as_each_alone(monkeypatch, is_causal):
  """The way of calling cuDNN, with another implementation in its place."""

  def plain(is_causal, q, k, v, mask):
    assert q.ndim == 4
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)

  monkeypatch.setattr(module, "_plain", plain)
  q, k, v, segment = arrays(rows=6)
  mask = (segment[:, :, None] == segment[:, None, :])[:, None]
  dy = jax.random.normal(jax.random.key(1), q.shape)

  def gradients(attend, q, k, v, mask, dy):
    y, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)
    return y, pull(dy)

  def ours(q, k, v, mask):
    return module._masked(is_causal, q, k, v, mask)

  expected = gradients(
    lambda q, k, v, mask: plain(is_causal, q, k, v, mask), q, k, v, mask, dy
  )
  split = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v, mask, dy)]
  found = jax.jit(jax.vmap(lambda *a: gradients(ours, *a)))(*split)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one.reshape(other.shape), other, rtol=2e-5, atol=2e-6)
  # What all of them share has no dimension of its own.
  shared = jax.vmap(ours, in_axes=(0, None, 0, None))(
    split[0], split[1][0], split[2], split[3][0]
  )
  each = [
    plain(is_causal, split[0][n], split[1][0], split[2][n], split[3][0])
    for n in range(3)
  ]
  np.testing.assert_allclose(shared, jnp.stack(each), rtol=2e-5, atol=2e-6)


def test_a_config_names_an_implementation_that_exists():
  with pytest.raises(ValueError, match="implementation='flash'; use None, 'xla'"):
    block = BlockConfig(Attention(num_heads=2, implementation="flash"), Dense(8))
    ModelConfig(8, 8, segments=(((block,), 1),))


@pytest.mark.accelerator
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_computes_what_xla_does(is_causal, packed, dtype):
  q, k, v, segment = arrays(rows=4, seq=256, heads=8, kv_heads=2, width=64, dtype=dtype)
  segment = segment if packed else None
  assert module.choose(None, q, k)[0] == "cudnn"

  def run(name, q, k, v):
    def loss(q, k, v):
      y = module.attention(
        q, k, v, segment, is_causal=is_causal, implementation=name
      ).astype(jnp.float32)
      return jnp.sum(jnp.sin(3 * y)), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *grads

  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  with jax.default_matmul_precision("highest"):
    expected = run("xla", *wide)
  found = jax.jit(jax.vmap(lambda *a: run("cudnn", *a)))(q[None], k[None], v[None])
  for one, other in zip(found, expected, strict=True):
    error = jnp.linalg.norm(one[0].astype(jnp.float32) - other)
    assert error < 2e-2 * jnp.linalg.norm(other)
