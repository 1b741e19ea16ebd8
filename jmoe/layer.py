"""The whole flow of a sparse layer, on a screen: `moe`.

x_TD --gate--> logits_TE --restrict--> mask_TE --router--> Routing --assign--> Plan
 y_TD <--(aggregate)<-- home <-- [dispatch: carry -> experts(Rows) -> carry home]
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jmoe import checks
from jmoe._carrying import Experts, carried, scaled, with_shared
from jmoe.assign import assign
from jmoe.config import MoEConfig
from jmoe.contexts import choose_layer, tokens, with_rows
from jmoe.keeping import named
from jmoe.kernels import devices
from jmoe.parallel import spmd
from jmoe.parallel.shards import Shards
from jmoe.parameters import (
  after_step as after_step,
  has_state as has_state,
  init_section as init_section,
  init_state as init_state,
  moe_init as moe_init,
  param_shapes as param_shapes,
)
from jmoe.report import report, report_mixing
from jmoe.types import Context, Info, Params, State
from jmoe.use import Use, fact

_STAGES = ("input_noise", "logit_noise", "select_noise", "restrict", "router", "assign")


def moe(
  params: Params,
  x_TD: Array,
  config: MoEConfig,
  *,
  context: Context = Context(),
  state: State = State(),
  key: Array | None = None,
  train: bool = False,
  residual: Array | None = None,
  previous_logits: Array | None = None,
  forced: Array | None = None,
  axes: tuple[str, ...] | None = None,
  with_plan: bool = False,
) -> tuple[Array, Info]:
  """A sparse layer: every stage that `config` names, in order.

  Args:
    params: from `moe_init`.
    x_TD: activations of a float dtype; routing runs in float32 or wider.
    config: hashable; calls with an equal one are traced once.
    context: what stages need beside activations; `valid` marks padding.
    state: from `init_state`; what is not learned by gradient.
    key: for noise and random choices; required where the configuration draws.
    train: training's noise, capacity factors and state updates.
    residual: `[T,D]` for aggregations that own the block's skip connection.
    previous_logits: f32[T,E] for gates with a residual between layers.
    forced: recorded choices to replay with today's weights: i32[T,K], or i32[L,T,K]
      with `context.layer` (i32[G,E,C] of tokens for expert choice).
    axes: mesh axes over which losses with mesh scope, load and drops are summed.
    with_plan: return the plan in `Info.plan`.

  Returns:
    `[T,D]` in x's dtype (another shape if the aggregation says so), and `Info`.

  Raises:
    ValueError: before any compilation, naming the argument, its value and the remedy.
  """
  checks.activations(x_TD, config, rank=2)
  arrays = (residual, previous_logits, forced)
  return _call(
    params, x_TD, config, context, state, key, train, arrays, axes, with_plan
  )


def apply(
  params: Params,
  x: Array,
  config: MoEConfig,
  *,
  context: Context | None = None,
  state: State = State(),
  key: Array | None = None,
  train: bool = False,
  residual: Array | None = None,
  previous_logits: Array | None = None,
  forced: Array | None = None,
  axes: tuple[str, ...] | None = None,
  with_plan: bool = False,
) -> tuple[Array, Info]:
  """`moe` for activations `[..., D]`: what both shells call.

  Args:
    x: the last leading dimension is the sequence, the others make rows.
    context: fields shaped `[...]` or flat; see `jmoe.contexts.flatten`.
    residual: shaped like x.

  Other arguments and errors are those of `moe`; the output is shaped like x.
  """
  checks.activations(x, config)
  arrays = (residual, previous_logits, forced)
  context = with_rows(context, x.shape[:-1])
  return _call(params, x, config, context, state, key, train, arrays, axes, with_plan)


def _call(params, x, config, context, state, key, train, arrays, axes, with_plan):
  residual, logits, forced = arrays
  given = (residual, logits, forced, axes, with_plan)
  context = checks.call(params, x, config, context, state, key, train, *given)
  checks.over_mesh(config, x, context, train, axes)
  static = dict(config=config, train=bool(train), axes=axes, with_plan=bool(with_plan))
  device = devices.current_device()
  return _moe(dict(params), x, context, state, key, arrays, device=device, **static)


_STATIC = ("config", "train", "axes", "with_plan", "device")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _moe(
  params, x, context, state, key, arrays, *, config, train, axes, with_plan, device
):
  del device  # what is traced for one holds its kernels
  given = (params, x, context, state, key, arrays)
  static = dict(config=config, train=train, with_plan=with_plan)
  split = spmd.over_mesh(config)
  if split is not None and spmd.by_gspmd(config):
    return spmd.constrained(_flow, split, *given, **static)
  if split is None:
    return _flow(*given, axes=axes, **static)
  return spmd.run(_flow, split, *given, **static)


def _flow(params, x, context, state, key, arrays, *, config, train, axes, with_plan):
  residual, previous_logits, forced = arrays
  lead = x.shape[:-1]
  context = tokens(context, lead)
  x_TD = x.reshape(-1, config.d_model)
  if context.valid is not None:
    # Padding may hold anything: zeros keep its NaN out of sums and gradients.
    x_TD = jnp.where(context.valid[:, None], x_TD, 0)
    if previous_logits is not None:
      previous_logits = jnp.where(context.valid[:, None], previous_logits, 0)
    if residual is not None:
      residual = jnp.where(context.valid.reshape(*lead, 1), residual, 0)
  if forced is not None and forced.ndim == 3 and config.k is not None:
    forced = choose_layer(forced, context)
  keys = _keys(key, context)
  gate_params = {**params.get("gate", {}), **state.gate}
  experts = Experts(config.experts, params.get("experts", {}))

  # What the gate thinks.  The scopes are what a profile calls these parts.
  with jax.named_scope("gate"):
    seen_TD = _noisy(config.input_noise, x_TD, context, keys["input_noise"], train)
    logits = config.gate(
      gate_params,
      seen_TD,
      context,
      previous_logits=previous_logits,
      num_experts=config.num_experts,
    )
  logits = named(logits, "routing")
  if getattr(config.router.function, "dense", False):
    mixing = config.router(logits, context=context)
    y_TD = carried(config, x_TD, mixing, experts, None, axes)
    y_TD = with_shared(config, params, y_TD, x_TD, axes)
    return y_TD.reshape(x.shape), report_mixing(mixing, state, axes, with_plan)

  # Which experts a token may use, and how much it likes each.
  with jax.named_scope("route"):
    scored_TE = _noisy(config.logit_noise, logits, context, keys["logit_noise"], train)
    scores_TE = config.score(scored_TE)
    select_TE = scores_TE
    if config.select_noise is not None:
      draw = keys["select_noise"]
      select_TE = _noisy(config.select_noise, scored_TE, context, draw, train)
    if state.bias is not None:
      select_TE = jax.lax.stop_gradient(select_TE) + state.bias
    mask_TE = None
    for i, restrict in checks.in_turn(config.restrict):
      draw = _restrict_key(restrict, key, context, i)
      one_TE = restrict(
        select_TE, context, mask=mask_TE, key=draw, train=train, axes=axes
      )
      mask_TE = one_TE if mask_TE is None else mask_TE & one_TE
    if config.rescore and mask_TE is not None:
      # A finite floor: a row without experts stays a number, and enters no loss.
      logits = jnp.where(mask_TE, logits, -1e30)
      scored_TE = jnp.where(mask_TE, scored_TE, -1e30)
      scores_TE = config.score(scored_TE)

    # Which it chooses.
    routing = config.router(
      logits,
      scores_TE,
      select_TE,
      mask=mask_TE,
      context=context,
      key=keys["router"],
      train=train,
      forced=forced,
    )
  if train and config.logit_noise is not None and routing.noisy_logits is None:
    routing = dataclasses.replace(routing, noisy_logits=scored_TE)

  # Who finds a slot, and what it weighs.
  N = routing.expert.shape[0]
  across = axes.experts if isinstance(axes, Shards) else ()
  if across:  # of the rows of all devices, of which any may get all
    N *= jax.lax.psum(1, across)
  max_rows = None if config.max_rows is None else max(1, int(config.max_rows * N))
  with jax.named_scope("assign"):
    plan = assign(
      routing,
      context,
      capacity=config.capacity,
      priority=config.priority,
      train=train,
      key=keys["assign"],
      max_rows=max_rows,
      axes=across,
    )
    plan = named(config.renormalise(plan), "routing")

  # There, through the experts, and home.
  home = scaled(config, plan)
  y = carried(config, x_TD, plan, experts, home, axes)
  if config.aggregate is not None:
    residual_TD = None if residual is None else residual.reshape(x_TD.shape)
    with jax.named_scope("aggregate"):
      y = config.aggregate(params.get("aggregate", {}), y, plan, x_TD, residual_TD)
  y = with_shared(config, params, y, x_TD, axes)
  info = report(config, plan, _served(context, mask_TE), state, train, axes, with_plan)
  return y.reshape(*lead, *y.shape[1:]), info


def _keys(key: Array | None, context: Context) -> dict[str, Any]:
  """A key per stage and layer, so that stages draw independently of each other."""
  if key is None:
    return dict.fromkeys(_STAGES)
  if context.layer is not None:
    key = jax.random.fold_in(key, context.layer)
  return {stage: jax.random.fold_in(key, i) for i, stage in enumerate(_STAGES)}


def _restrict_key(restrict: Use, key: Array | None, context: Context, i: int):
  """Of the i-th restriction; without the layer's number if it says so."""
  if key is None:
    return None
  same = fact(restrict, "same_in_layers", lambda **_: False)(**restrict.kwargs)
  context = dataclasses.replace(context, layer=None) if same else context
  return jax.random.fold_in(_keys(key, context)["restrict"], i)


def _noisy(noise, array: Array, context: Context, key: Array | None, train: bool):
  if noise is None or not train:
    return array
  return noise(array, context=context, key=key)


def _served(context: Context, mask_TE: Array | None) -> Context:
  """The context in which a token that no expert may serve is as padding to losses."""
  if mask_TE is None:
    return context
  any_T = jnp.any(mask_TE, axis=1)
  valid_T = any_T if context.valid is None else context.valid & any_T
  return dataclasses.replace(context, valid=valid_T)
