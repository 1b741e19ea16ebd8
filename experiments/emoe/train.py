"""Fine-tuning as one program: models of an arm side by side, all steps in a loop.

Models of a job differ in seed and learning rate and begin from the same weights, so
they are one `vmap`.  Products are in float32 with the precision that is asked for:
by default TensorFloat-32 where there is one, as usual for fine-tuning; the scores of
groups are exact whatever it is.
"""
# SPDX-License-Identifier: Apache-2.0

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.emoe import kinds
from jmoe.losses import total_loss

RANK, ALPHA = 8, 16.0
_ADAPTED = ("query", "key", "value", "out")
BALANCE = 0.01  # weight of the load-balance loss, where a gate is trained

Arrays = Mapping[str, Array]


class Settings(NamedTuple):
  """What is compiled, beside shapes."""

  config: kinds.Config
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
  rows: Arrays,
  *,
  settings: Settings,
) -> tuple[Arrays, Arrays, Arrays, Array]:
  """(parameters, state, head, f32[models,steps] losses) after all steps.

  Args:
    params, state: of the model that all begin from.
    sign, follow: of `arms.Start`.
    models: with a leading [models].
    rows: all texts, as the kind of model takes them, with a leading [M].
  """

  def one(model: Model):
    return _one(params, state, sign, follow, model, rows, settings)

  with jax.default_matmul_precision(settings.precision):
    return jax.vmap(one)(models)


def _one(params, state, sign, follow, model: Model, rows, settings: Settings):
  kind = kinds.of(settings.config)
  key_head, key_lora = jax.random.split(model.key)
  head = kind.head(key_head, settings.config)
  learned: dict[str, Any] = {"model": dict(params), "gate": {}, "head": head}
  if settings.tuning == "lora":
    # A gate that learns does so beside adapters too, whole, as the head does.
    gate = {name: x for name, x in params.items() if ".moe.gate." in name}
    learned |= {"model": adapters(key_lora, params), "gate": gate}

  def whole(learned) -> Arrays:
    if settings.tuning == "full":
      return learned["model"]
    return adapted(params, learned["model"]) | learned["gate"]

  adam = optax.scale_by_adam()
  steps = model.order.shape[0]

  def step(carry, now):
    learned, moments, state = carry
    number, rows_B = now

    def objective(learned):
      some = {name: x[rows_B] for name, x in rows.items()}
      given = whole(learned), state, learned["head"], some
      loss, infos = kind.loss(*given, settings.config)
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
def scores(
  params: Arrays,
  state: Arrays,
  head: Arrays,
  rows: Arrays,
  *,
  settings: Settings,
  batch: int,
) -> Array:
  """[models,M]: what each text adds to a sum, of each model; see `Kind.score`.

  Args:
    params, state, head: with a leading [models].
    rows: texts, M a multiple of the batch.
    settings: of the model as it is asked now.
    batch: texts at a time.
  """
  kind = kinds.of(settings.config)
  parts = jax.tree.map(lambda x: x.reshape(-1, batch, *x.shape[1:]), dict(rows))

  def one(params, state, head):
    def some(part):
      return kind.score(params, state, head, part, settings.config)

    return jax.lax.map(some, parts).reshape(-1)

  with jax.default_matmul_precision(settings.precision):
    return jax.vmap(one)(params, state, head)


def _followed(params: Arrays, state: Arrays, sign: Array, follow: Array) -> Arrays:
  """Means of the keys as they are now, or those of before; signed."""
  found = {}
  for name, old_ED in state.items():
    at = name.removesuffix("state.gate.key_ED") + "experts."
    experts = {n.removeprefix(at): x for n, x in params.items() if n.startswith(at)}
    found[name] = jnp.where(follow, sign * kinds.means(experts), old_ED)
  return found


def adapters(key: Array, params: Arrays) -> dict[str, dict[str, Array]]:
  """LoRA (Hu et al. 2021, arXiv:2106.09685): in drawn, out zero, of attention alone.

  Draws go by depth: the same whether layers are one stack or several.
  """
  ends = tuple(f".{name}.kernel" for name in _ADAPTED)
  places = {name.rsplit(".", 2)[0] for name in params if name.endswith(ends)}
  found, number = {}, 0
  for place in sorted(places, key=lambda p: [int(n) for n in re.findall(r"\d+", p)]):
    for n, own in enumerate(sorted(_ADAPTED)):
      *stack, into, out = params[name := f"{place}.{own}.kernel"].shape
      keys = [number + n + len(_ADAPTED) * layer for layer in range(math.prod(stack))]
      drawn = [
        jax.random.normal(jax.random.fold_in(key, k), (into, RANK)) for k in keys
      ]
      first = jnp.stack(drawn).reshape(*stack, into, RANK) / np.sqrt(into)
      found[name] = {"in": first, "out": jnp.zeros((*stack, RANK, out))}
    number += len(_ADAPTED) * math.prod(stack)
  return found


def adapted(params: Arrays, adapters: Mapping[str, Arrays]) -> dict[str, Array]:
  scale = ALPHA / RANK
  return dict(params) | {
    name: params[name] + scale * (pair["in"] @ pair["out"])
    for name, pair in adapters.items()
  }
