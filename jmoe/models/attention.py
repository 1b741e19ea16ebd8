"""Attention over whole rows: which implementation of jax's serves, and why.

`jax.nn.dot_product_attention` is plain XLA unless told otherwise, and then writes the
scores, [B,H,S,S], to memory several times over: on an H200 that took more time than all
matrix products of a model of 512 tokens a row.  cuDNN's kernel never writes them.

Letters are those of `blocks`.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import logging

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from jmoe.kernels.devices import GPUS, current_device

_log = logging.getLogger("jmoe")
_said: set[str] = set()


def attention(
  q_BSHd: Array,
  k_BMNd: Array,
  v_BMNd: Array,
  segment_BS: Array | None,
  *,
  is_causal: bool,
  implementation: str | None = None,
) -> Array:
  """f[B,S,H,d]: every query over the keys of its own segment, earlier ones if causal.

  Args:
    q_BSHd: queries.
    k_BMNd, v_BMNd: keys and values, M = S; H is a multiple of N.
    segment_BS: i32[B,S]; padding is a segment of its own and sees itself, so that no
      query is without a key.  None: a row is one segment.
    is_causal: hide later keys.
    implementation: "xla", "cudnn", or None: the faster of those that serve this device,
      dtype and shape, said once in the log "jmoe".

  Raises:
    ValueError: "cudnn" was asked for and cannot serve.
  """
  name, why = choose(implementation, q_BSHd, k_BMNd)
  message = f"attention: {name} ({why})"
  if message not in _said:
    _said.add(message)
    _log.info(message)
  mask_B1SS = None
  if segment_BS is not None:
    mask_B1SS = (segment_BS[:, :, None] == segment_BS[:, None, :])[:, None]
  # jax's own code mixes bfloat16 and float32, which strict promotion would refuse.
  with jax.numpy_dtype_promotion("standard"):
    if name == "cudnn" and mask_B1SS is not None:
      return _masked(is_causal, q_BSHd, k_BMNd, v_BMNd, mask_B1SS)
    return jax.nn.dot_product_attention(
      q_BSHd,
      k_BMNd,
      v_BMNd,
      mask=mask_B1SS,
      is_causal=is_causal,
      implementation="cudnn" if name == "cudnn" else "xla",
    )


def choose(implementation: str | None, q: Array, k: Array) -> tuple[str, str]:
  """The implementation and the reason for it.

  Args:
    implementation: what was asked for, or None.
    q, k: `[B,S,H,d]` and `[B,M,N,d]`; only shape and dtype are read.

  Raises:
    ValueError: "cudnn" was asked for and cannot serve.
  """
  if implementation == "xla":
    return "xla", "as configured"
  reason = _unfit(q, k)
  if reason is None:
    return "cudnn", "fused, no scores in memory"
  if implementation == "cudnn":
    raise ValueError(
      f"attention: implementation='cudnn' cannot serve, {reason}; use None or 'xla'."
    )
  return "xla", reason


def _unfit(q: Array, k: Array) -> str | None:
  """Why cuDNN cannot serve, if it cannot."""
  if current_device() not in GPUS:
    return f"the device is {current_device()}"
  capability = getattr(jax.devices()[0], "compute_capability", None)
  if capability is None or "." not in str(capability):
    return "the device is no NVIDIA GPU"
  if int(str(capability).split(".")[0]) < 8:
    return f"compute capability {capability} is under 8.0"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"the dtype is {q.dtype}, not bfloat16 or float16"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"head_dim={q.shape[-1]} is not a multiple of 8 up to 128"
  if q.shape[1] != k.shape[1] or q.shape[1] % 2:
    return f"{q.shape[1]} queries to {k.shape[1]} keys; it takes as many, and even"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked(is_causal: bool, q: Array, k: Array, v: Array, mask: Array) -> Array:
  """cuDNN's attention with a mask, which under vmap its own rule cannot batch.

  Rows do not meet, so a batch of calls is one call of more rows; jax's rule reshapes a
  mask as if it had a slice for each head.  The gradient makes the output anew, which
  costs a quarter more time and keeps nothing but the inputs.
  """
  return _forward(is_causal)(q, k, v, mask)


def _masked_forward(is_causal, q, k, v, mask):
  return _forward(is_causal)(q, k, v, mask), (q, k, v, mask)


def _masked_backward(is_causal, inputs, dy):
  return (*_backward(is_causal)(*inputs, dy), None)


_masked.defvjp(_masked_forward, _masked_backward)


def _plain(is_causal: bool, q, k, v, mask):
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn"
  )


def _forward(is_causal: bool):
  return _by_rows(functools.partial(_plain, is_causal))


def _backward(is_causal: bool):
  def gradients(q, k, v, mask, dy):
    attend = functools.partial(_plain, is_causal, mask=mask)
    return jax.vjp(attend, q, k, v)[1](dy)

  return _by_rows(gradients)


def _by_rows(function):
  """`function` of arrays `[rows, ...]`, for which a vmapped dimension is more rows."""
  folded = custom_vmap(function)

  @folded.def_vmap
  def rule(size, batched, *arrays):
    arrays = [
      x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
      for x, is_batched in zip(arrays, batched, strict=True)
    ]
    out = _by_rows(function)(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    split = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
    return split, jax.tree.map(lambda _: True, split)

  return folded
