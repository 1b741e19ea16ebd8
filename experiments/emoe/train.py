"""Fine-tuning as one program: models of an arm side by side, all steps in a loop.

Models of a job differ in seed and learning rate and begin from the same weights, so
they are one `vmap`.  Products are in float32 with the precision that is asked for:
by default TensorFloat-32 where there is one, as usual for fine-tuning; the scores of
groups are exact whatever it is.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jmoe.losses import total_loss
from jmoe.models.encoder import EncoderConfig, mean_pool
from jmoe.surgery.encoders import blueprint

RANK, ALPHA = 8, 16.0
_ADAPTED = ("query", "key", "value", "out")
BALANCE = 0.01  # weight of the load-balance loss, where a gate is trained

Arrays = Mapping[str, Array]


class Settings(NamedTuple):
  """What is compiled, beside shapes."""

  config: EncoderConfig
  # "full"; or "lora": attention by products of rank 8, and a gate that is trained.
  tuning: str
  precision: str  # of jax.default_matmul_precision


class Model(NamedTuple):
  """One model's data; in a job's program each has a leading [models]."""

  order: Array  # i32[steps,batch]
  rate: Array  # f32[] at first; falls to zero in a straight line
  key: Array  # of what is drawn: the head, and the adapters


@functools.partial(jax.jit, static_argnames="settings")
def trained(
  params: Arrays,
  state: Arrays,
  sign: Array,
  follow: Array,
  models: Model,
  tokens_MS: Array,
  label_M: Array,
  *,
  settings: Settings,
) -> tuple[Arrays, Arrays, Arrays, Array]:
  """(parameters, state, head, f32[models,steps] losses) after all steps.

  Args:
    params, state: of the encoder that all begin from.
    sign, follow: of `arms.Start`.
    models: with a leading [models].
    tokens_MS: i32[M,S]; 0 is padding.
    label_M: i32[M], 0 or 1.
  """

  def one(model: Model):
    return _one(params, state, sign, follow, model, tokens_MS, label_M, settings)

  with jax.default_matmul_precision(settings.precision):
    return jax.vmap(one)(models)


def _one(params, state, sign, follow, model: Model, tokens_MS, label_M, settings):
  d = settings.config.d_model
  key_head, key_lora = jax.random.split(model.key)
  head = {"kernel": 0.02 * jax.random.normal(key_head, (d, 2)), "bias": jnp.zeros(2)}
  learned: dict[str, Any] = {"encoder": dict(params), "gate": {}, "head": head}
  if settings.tuning == "lora":
    # A gate that learns does so beside adapters too, whole, as the head does.
    gate = {name: x for name, x in params.items() if ".moe.gate." in name}
    learned |= {"encoder": _adapters(key_lora, params), "gate": gate}

  def whole(learned) -> Arrays:
    if settings.tuning == "full":
      return learned["encoder"]
    return _adapted(params, learned["encoder"]) | learned["gate"]

  adam = optax.scale_by_adam()
  steps = model.order.shape[0]

  def step(carry, now):
    learned, moments, state = carry
    number, rows_B = now

    def objective(learned):
      found = _logits(
        whole(learned), state, learned["head"], tokens_MS[rows_B], settings, train=True
      )
      logits_B2, infos = found
      nats_B = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits_B2, label_M[rows_B]
      )
      loss = jnp.mean(nats_B)
      if any("load_balance" in info.losses for info in infos):
        loss += total_loss(infos, {"load_balance": BALANCE})
      return loss

    loss, gradient = jax.value_and_grad(objective)(learned)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
      updates, moments = adam.update(gradient, moments)
    rate = model.rate * (1 - number / steps)
    learned = jax.tree.map(lambda p, u: p - rate * u, learned, updates)
    state = _followed(whole(learned), state, sign, follow)
    return (learned, moments, state), loss

  first = learned, adam.init(learned), dict(state)
  numbers = jnp.arange(steps, dtype=jnp.float32)
  (learned, _, state), losses = jax.lax.scan(step, first, (numbers, model.order))
  return dict(whole(learned)), state, learned["head"], losses


@functools.partial(jax.jit, static_argnames=("settings", "batch"))
def right(
  params: Arrays,
  state: Arrays,
  head: Arrays,
  tokens_MS: Array,
  label_M: Array,
  *,
  settings: Settings,
  batch: int,
) -> Array:
  """bool[models,M]: which texts each model labels as they are.

  Args:
    params, state, head: with a leading [models].
    tokens_MS, label_M: of the texts, M a multiple of the batch.
    settings: of the encoder as it is asked now.
    batch: texts at a time.
  """

  def one(params, state, head):
    def some(rows):
      logits_B2, _ = _logits(params, state, head, rows[0], settings, train=False)
      return jnp.argmax(logits_B2, axis=1) == rows[1]

    parts = tokens_MS.reshape(-1, batch, tokens_MS.shape[1]), label_M.reshape(-1, batch)
    return jax.lax.map(some, parts).reshape(-1)

  with jax.default_matmul_precision(settings.precision):
    return jax.vmap(one)(params, state, head)


def _logits(params, state, head, tokens_BS, settings: Settings, *, train: bool):
  encoder: Any = blueprint(settings.config).model(dict(params), dict(state))
  valid_BS = tokens_BS > 0
  x_BSD, infos = encoder(tokens_BS, valid_BS, train=train)
  return mean_pool(x_BSD, valid_BS) @ head["kernel"] + head["bias"], infos


def _followed(params: Arrays, state: Arrays, sign: Array, follow: Array) -> Arrays:
  """Means of the keys as they are now, or those of before; signed."""
  found = {}
  for name, old_ED in state.items():
    up_EDF = params[name.replace("state.gate.key_ED", "experts.up_EDF")]
    new_ED = sign * jnp.mean(jax.lax.stop_gradient(up_EDF), axis=-1)
    found[name] = jnp.where(follow, new_ED, old_ED)
  return found


def _adapters(key: Array, params: Arrays) -> dict[str, dict[str, Array]]:
  """LoRA (Hu et al. 2021, arXiv:2106.09685): in drawn, out zero, of attention alone."""
  names = [n for n in params if n.endswith(tuple(f".{a}.kernel" for a in _ADAPTED))]
  found = {}
  for n, name in enumerate(sorted(names)):
    into, out = params[name].shape
    drawn = jax.random.normal(jax.random.fold_in(key, n), (into, RANK))
    found[name] = {"in": drawn / np.sqrt(into), "out": jnp.zeros((RANK, out))}
  return found


def _adapted(params: Arrays, adapters: Mapping[str, Arrays]) -> dict[str, Array]:
  scale = ALPHA / RANK
  return dict(params) | {
    name: params[name] + scale * (pair["in"] @ pair["out"])
    for name, pair in adapters.items()
  }
