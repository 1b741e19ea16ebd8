"""`nnx.MoE`: the layer as a Flax NNX module; all mathematics is in `layer.moe`."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array

from jmoe import checks, layer
from jmoe.config import MoEConfig, resolve
from jmoe.types import Context, Info, State
from jmoe.use import shown


class LayerState(nnx.Variable):
  """Balance biases, gate buffers and tables: saved, but no business of an optimizer."""


class _Tree(nnx.Module):
  """A nested dict of arrays as variables under the same names."""

  def __init__(self, tree: Mapping[str, Any], kind: type[nnx.Variable]):
    for name, leaf in tree.items():
      if isinstance(leaf, Mapping):
        setattr(self, name, _Tree(leaf, kind))
      else:
        setattr(self, name, kind(leaf))

  def arrays(self) -> dict[str, Any]:
    """The nested dict again."""
    found = {}
    for name, leaf in vars(self).items():
      if isinstance(leaf, _Tree):
        found[name] = leaf.arrays()
      elif isinstance(leaf, nnx.Variable):
        found[name] = leaf[...]
    return found

  def write(self, tree: Mapping[str, Any]) -> None:
    """New arrays in place of the old ones."""
    for name, leaf in tree.items():
      if isinstance(leaf, Mapping):
        getattr(self, name).write(leaf)
      else:
        getattr(self, name)[...] = leaf


class MoE(nnx.Module):
  """A mixture-of-experts layer.

  >>> import jax, jax.numpy as jnp, jmoe
  >>> from flax import nnx
  >>> moe = jmoe.nnx.MoE(16, 32, num_experts=4, k=2, rngs=nnx.Rngs(0))
  >>> y, info = moe(jnp.ones((2, 5, 16)))
  >>> y.shape, sorted(info.losses)
  ((2, 5, 16), ['load_balance', 'router_z'])

  Parameters are `nnx.Param`s under the names of `jmoe.moe_init`, the same tree as
  `jmoe.linen.MoE`'s.  State is kept in `LayerState` variables, which a call reads and
  only `update` writes.
  """

  def __init__(
    self,
    config: MoEConfig | int,
    d_ff: int | None = None,
    *,
    rngs: nnx.Rngs,
    **keywords: Any,
  ):
    """From a configuration, or from plain keywords.

    Args:
      config: a `MoEConfig` or preset; or d_model.
      d_ff: width of an expert, with plain keywords.
      rngs: `params` is drawn from.
      **keywords: of `jmoe.simple`: `num_experts`, `k`, `capacity_factor`, ...

    Raises:
      ValueError, TypeError: naming the argument, its value and the remedy.
    """
    self.config = resolve(config, d_ff, keywords)
    check_rngs("MoE", rngs)
    params = layer.moe_init(rngs.params(), self.config)
    for name, part in params.items():
      setattr(self, name, _Tree(part, nnx.Param))
    draws = checks.fact(self.config.router, "table") is not None
    key = rngs.params() if draws else None
    state = layer.init_state(self.config, params, key)
    self.state = _Tree(_state_dict(state), LayerState)

  def __call__(
    self,
    x: Array,
    *,
    context: Context | None = None,
    key: Array | None = None,
    train: bool = False,
    residual: Array | None = None,
    previous_logits: Array | None = None,
    forced: Array | None = None,
    axes: tuple[str, ...] | None = None,
    with_plan: bool = False,
  ) -> tuple[Array, Info]:
    """Applies the layer.

    Args:
      x: `[..., D]` activations.
      context: fields shaped `[...]` or flat; see `jmoe.Context`.
      key, train, previous_logits, forced, axes, with_plan: as for `jmoe.moe`.
      residual: shaped like x.

    Returns:
      The output shaped like x, and `Info`.
    """
    return layer.apply(
      self.params(),
      x,
      self.config,
      context=context,
      state=self.get_state(),
      key=key,
      train=train,
      residual=residual,
      previous_logits=previous_logits,
      forced=forced,
      axes=axes,
      with_plan=with_plan,
    )

  def params(self) -> dict[str, Any]:
    """The parameters as `jmoe.moe` takes them."""
    return {
      name: part.arrays()
      for name, part in vars(self).items()
      if isinstance(part, _Tree) and name != "state"
    }

  def get_state(self) -> State:
    """The state as `jmoe.moe` takes it."""
    return State(**self.state.arrays())

  def update(self, info: Info) -> None:
    """Takes over the state that a training call returned; call it after the optimizer.

    Buffers that a gate makes of the experts are made of those of now, if it says so.

    Args:
      info: of the step's call in training; its load should be of the whole batch.

    Raises:
      TypeError: no `Info`.
      ValueError: one of another layer, whose state is of other shapes.
    """
    if not isinstance(info, Info):
      raise TypeError(f"update: info={shown(info)} is not what a call returned.")
    state = layer.after_step(self.config, self.params(), info.state)
    new, old = _state_dict(state), self.state.arrays()
    if (given := _shapes(new)) != (own := _shapes(old)):
      raise ValueError(
        f"update: info.state holds {shown(given)}, but this layer's state is "
        f"{shown(own)}; pass the Info that a call of this layer returned."
      )
    self.state.write(new)


def check_rngs(where: str, rngs: Any) -> None:
  """Raises unless these are `nnx.Rngs` that parameters can be drawn from."""
  if not isinstance(rngs, nnx.Rngs):
    raise TypeError(f"{where}: rngs={shown(rngs)} is no nnx.Rngs; pass nnx.Rngs(0).")
  if not (hasattr(rngs, "params") or hasattr(rngs, "default")):
    raise ValueError(
      f"{where}: rngs has no stream 'params' and no default; pass nnx.Rngs(0) or "
      "nnx.Rngs(params=0)."
    )


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = ((".".join(str(step.key) for step in path), leaf) for path, leaf in leaves)
  return {name: leaf.shape for name, leaf in names}


def _state_dict(state: State) -> dict[str, Any]:
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {k: v for k, v in fields.items() if v is not None and len(jax.tree.leaves(v))}
