"""jmoe's OLMoE-1B-7B and its step: what is measured, as functions of arrays."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments import state as states
from experiments.benchmarks.olmoe_step.size import Size
from experiments.optim.in_backward import AdamW, updated_in_backward
from experiments.optim.roles import role
from jmoe import keeping
from jmoe.config import ModelConfig
from jmoe.losses import total_loss
from jmoe.models import unrolled
from jmoe.presets import olmoe

KEEPS: dict[str, bool | tuple[str, ...]] = {
  "nothing": True,  # but each block's input
  "attention": ("attention", "residual", "routing"),
  "hidden": ("attention", "residual", "routing", "hidden"),
  "most": keeping.NAMES,
  "all": False,
}
OPTIMIZER = AdamW()


def config(size: Size, keep: str, *, loop: bool = False) -> ModelConfig:
  """The preset at this size, each layer by itself unless `loop`."""
  made = olmoe.MODELS["1b-7b"]
  (((block,), _),) = made.segments
  attention = dataclasses.replace(block.attention, num_heads=size.heads)
  sparse = olmoe.layer(
    d_model=size.d_model, d_ff=size.d_ff, num_experts=size.experts, k=size.k
  )
  # In one piece: less memory in one layer is little in sixteen, and takes 3% longer.
  experts = sparse.experts.replace(pieces=1)
  sparse = dataclasses.replace(sparse, experts=experts)
  block = dataclasses.replace(block, attention=attention, ff=sparse)
  made = dataclasses.replace(
    made,
    vocab_size=size.vocab,
    d_model=size.d_model,
    segments=(((block,), size.layers),),
    remat=KEEPS[keep],
  )
  return made if loop else unrolled(made)


def shapes(model: ModelConfig) -> tuple[states.Blueprint, dict[str, Any]]:
  """Structure, and parameters by name: bfloat16, gates and norms float32."""
  return states.blueprint(model, "bfloat16")


def drawn(like: dict[str, Any], seed: int = 0) -> dict[str, Any]:
  """Step, parameters and moments on the device, made one array at a time.

  Norms are ones, the rest normal of deviation 0.02: at the first step the loss is near
  the logarithm of the vocabulary.
  """
  params = {}
  for n, (name, x) in enumerate(like.items()):
    params[name] = _draw(jax.random.key(seed + n), x.shape, x.dtype, role(name))
  zero = jnp.zeros((), jnp.int32)
  return {"step": zero, "params": params, "moments": OPTIMIZER.init(params)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, shape: tuple[int, ...], dtype: Any, what: str) -> Array:
  if what == "norm":
    return jnp.ones(shape, dtype)
  return jnp.asarray(0.02, dtype) * jax.random.normal(key, shape, dtype)


def train_step(
  state: dict[str, Any],
  tokens_BS: Array,
  *,
  blueprint: states.Blueprint,
  chunk: int | None,
  in_backward: bool,
  loss_weights: Mapping[str, float] = olmoe.LOSS_WEIGHTS,
  cross_entropy: Callable[..., Array] | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
  """(the state one step later, loss of the next tokens and with routing losses).

  Args:
    state: of `drawn`; donate it.
    tokens_BS: i32[B,S]; each token but a row's last is scored on the one after it.
    blueprint: of a model without loops if `in_backward`.
    chunk: tokens whose logits exist at once.
    in_backward: update each block as soon as its gradient exists, not all at the end.
    loss_weights: of the routing losses.
    cross_entropy: `(model, x_BSD, target_BS, weight_BS, chunk=) -> f32[]`; None: the
      model's own.
  """
  params, moments = state["params"], state["moments"]
  corrections = OPTIMIZER.corrections(state["step"] + 1)
  tapped = [n for n in params if in_backward and n.startswith("segments.")]
  of_blocks = _some((params, *moments), tapped)
  of_rest = _some((params, *moments), [n for n in params if n not in set(tapped)])

  def objective(of_blocks, rest):
    blocks, first, second = of_blocks
    model = blueprint.model({**blocks, **rest}, {})

    def before(layer, parameters, x_BSD):
      return _tap(layer, parameters, x_BSD, (first, second), corrections)

    x_BSD, infos = model.hidden(
      tokens_BS, train=True, before=before if in_backward else None
    )
    target_BS = jnp.roll(tokens_BS, -1, axis=1)
    scored_BS = jnp.ones(tokens_BS.shape, jnp.float32).at[:, -1].set(0.0)
    weight_BS = scored_BS / jnp.sum(scored_BS)
    if cross_entropy is None:
      loss, _ = model.cross_entropy(x_BSD, target_BS, weight_BS, chunk=chunk)
    else:
      loss = cross_entropy(model, x_BSD, target_BS, weight_BS, chunk=chunk)
    return loss + total_loss(infos, dict(loss_weights)), loss

  (total, loss), (blocks, grads) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
    of_blocks, of_rest[0]
  )
  rest, rest_moments = OPTIMIZER.update(grads, of_rest[0], of_rest[1:], corrections)
  new = [{**a, **b} for a, b in zip(blocks, (rest, *rest_moments), strict=True)]
  state = {"step": state["step"] + 1, "params": new[0], "moments": tuple(new[1:])}
  return state, {"loss": loss, "total": total}


def _some(trees: tuple[dict[str, Array], ...], names: list[str]) -> Any:
  return tuple({name: tree[name] for name in names} for tree in trees)


def _tap(layer: int, parameters: Any, x_BSD: Array, moments: Any, corrections: Array):
  """A block's parameters and input, and its moments under the names they go by."""
  paths, tree = jax.tree_util.tree_flatten_with_path(parameters)

  def name(path):  # (block of the segment, ..., flax's wrapper around the array)
    return ".".join(["segments", str(layer), *map(states.path_part, path[:-1])])

  leaves = [leaf for _, leaf in paths]
  own = tuple(
    [of[name(path)].reshape(leaf.shape) for path, leaf in paths] for of in moments
  )
  both: Any = updated_in_backward(OPTIMIZER, corrections, leaves, own, x_BSD)
  leaves, x_BSD = both
  return jax.tree.unflatten(tree, leaves), x_BSD
