"""Rows of a sparse layer through its experts and home, for `jmoe.layer`."""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.combine import weighted_sum
from jmoe.config import MoEConfig
from jmoe.kernels.varying import over
from jmoe.parallel import spmd
from jmoe.parallel.shards import Shards
from jmoe.types import Groups, Home, Params, Plan, Rows
from jmoe.use import Use


class Experts(NamedTuple):
  """The experts of a layer with their parameters: what a dispatch strategy gets."""

  use: Use
  params: Params

  def __call__(self, rows: Rows) -> Array:
    with jax.named_scope("experts"):
      return self.use(self.params, rows)

  def each(self, buffers: tuple[Rows, ...]) -> tuple[Array, ...]:
    """Of several buffers, those first that are there first."""
    if not self._says("buffers"):
      return tuple(map(self, buffers))
    with jax.named_scope("experts"):
      return self.use(self.params, buffers)

  @property
  def weighs(self) -> bool:
    """Whether they multiply their rows by `Rows.weight`.

    So that they need not keep their outputs for the weights' gradient.
    """
    return self._says("weighs")

  @property
  def sums(self) -> bool:
    """Whether they bring their rows home themselves, where `Rows.sums` asks for it."""
    return self._says("sums")

  def _says(self, name: str) -> bool:
    # What `functools.wraps` has copied onto another function is not its own.
    function = self.use.function
    return getattr(function, name, False) and not hasattr(function, "__wrapped__")


def scaled(config: MoEConfig, plan: Plan) -> Home:
  """The way home; with `scale="input"` the weights go in rather than out."""
  home = config.combine(plan)
  if config.scale == "output":
    return home
  kept = plan.kept.astype(home.weight.dtype)
  return Home(kept, input_scale=weighted_sum(plan).weight, sums=home.sums)


def carried(config: MoEConfig, x_TD: Array, plan, experts: Experts, home, axes):
  """There and home, over the devices of a mesh if the experts are on several."""
  if not isinstance(axes, Shards):
    by_xla = spmd.over_mesh(config) if spmd.by_gspmd(config) else None
    given = {} if by_xla is None else dict(axis=by_xla.axes("expert"))
    return config.dispatch(x_TD, plan, experts, home, **given)
  # Where devices have parts of the hidden layers, tokens are told apart before they
  # leave and outputs summed when they are home: fewer rows than at the experts.
  # What is the same for all tokens, as weights of one, is told apart as well.
  differs = (*axes, *axes.features)
  x_TD, plan, home = jax.tree.map(lambda a: over(a, differs), (x_TD, plan, home))
  given = dict(axis=axes.experts, placement=axes.placement) if axes.experts else {}
  y = config.dispatch(x_TD, plan, experts, home, **given)
  return jax.lax.psum(y, axes.features) if axes.features else y


def with_shared(config: MoEConfig, params: Params, y: Array, x_TD: Array, axes):
  """The expert that every token takes: one group of all rows."""
  if config.shared is None:
    return y
  T = x_TD.shape[0]
  one = jnp.zeros(1, jnp.int32)
  features = axes.features if isinstance(axes, Shards) else ()
  groups = Groups(one, one + T, block=1, capacity=T)
  shared_TD = config.shared(params["shared"], Rows(over(x_TD, features), groups))
  if features:
    shared_TD = jax.lax.psum(shared_TD, features)
  return config.join(params.get("join", {}), y, shared_TD, x_TD)
