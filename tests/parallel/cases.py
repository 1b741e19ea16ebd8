"""Layers, meshes and strategies of the contract, and one device's results.

Eight devices, sixteen tokens at least on each; widths that every axis divides.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jmoe
from jmoe import Context, MoEConfig, capacity, dispatch, experts, losses, routers, use
from jmoe.kernels.grouped_matmul.reference import reference
from jmoe.layer import apply, param_shapes
from jmoe.parallel import Rules, mesh as meshes
from tests import _cases
from tests.tolerance import assert_close

B, S, D, F, E, GROUP = 8, 8, 8, 4, 8, 4
AXES = (*meshes.AXES, "node")
RULES = Rules(
  tokens=("data", "fsdp", "node", "expert"),
  sequence=("context",),
  expert=("node", "expert"),
  d_model=("fsdp",),
  d_ff=("tensor",),
)
MESHES = (
  "data=2,fsdp=2,expert=2",
  "fsdp=2,expert=2,tensor=2",
  "expert=8",
  "data=1,node=2,expert=2,tensor=2",
  "context=2,expert=4",
  "data=2,fsdp=4",
)
SLOTS = use(capacity.by_factor, factor=1.5, multiple_of=2)
LIMITED, DROPLESS = dict(capacity=SLOTS), dict(capacity=None)
# name -> (dispatch, fields beside it)
STRATEGIES: Mapping[str, tuple[Any, dict[str, Any]]] = {
  "all_gather": (use(dispatch.all_gather), DROPLESS),
  "all_gather, slots": (use(dispatch.all_gather), LIMITED),
  "all_gather, own first": (use(dispatch.all_gather, own_first=True), DROPLESS),
  "all_gather, own first, slots": (use(dispatch.all_gather, own_first=True), LIMITED),
  "all_to_all": (use(dispatch.all_to_all), LIMITED),
  "all_to_all, own first": (use(dispatch.all_to_all, own_first=True), LIMITED),
  "all_to_all, overlap": (use(dispatch.all_to_all, overlap=2), LIMITED),
  "hierarchical": (use(dispatch.hierarchical), LIMITED),
  "ragged_all_to_all": (use(dispatch.ragged_all_to_all), DROPLESS),
  "ragged_all_to_all, slots": (use(dispatch.ragged_all_to_all), LIMITED),
  "deduplicated": (use(dispatch.deduplicated), DROPLESS),
  "deduplicated, slots": (use(dispatch.deduplicated), LIMITED),
  "sort": (use(dispatch.sort), DROPLESS),
  "buckets": (use(dispatch.buckets), LIMITED),
  "einsum": (use(dispatch.einsum), LIMITED),
}
ROUTERS = {
  name: _cases.ROUTERS[name](E)
  for name in (
    "top_k 1", "top_k 2, bias, scale", "noisy_top_k", "top_2 random, holds", "hashed",
    "every_expert",
  )
}  # fmt: skip
ROUTERS["expert_choice"] = dict(router=use(routers.expert_choice, capacity_factor=4.0))
EXTRAS: Mapping[str, dict[str, Any]] = {
  "plain": dict(),
  "shared, input": dict(scale="input", shared=use(experts.mlp, d_ff=F, bias=True)),
  "padding": dict(experts=use(experts.glu, d_ff=F)),
  "random": dict(priority=use(jmoe.priority.random)),
}
# Small programs: the devices' own matmuls are tested by themselves, and in one extra.
MATMUL = dict(matmul=use(reference))
KINDS = ("auto", "explicit")
FACTORS = dict(
  router=tuple(ROUTERS),
  strategy=tuple(STRATEGIES),
  mesh=MESHES,
  kind=KINDS,
  extra=tuple(EXTRAS),
)


def fits(row: Mapping[str, Any]) -> bool:
  """Whether a row, or part of one, can be configured at all, on one device too."""
  router, strategy, extra = (row.get(n) for n in ("router", "strategy", "extra"))
  own = router == "expert_choice"
  if own and strategy is not None:
    if STRATEGIES[strategy][1] is DROPLESS or strategy.startswith("deduplicated"):
      return False  # its choice is its capacity, and no fixed number of a token's
  return not (own and extra == "random")


def twin(row: Mapping[str, Any]) -> bool:
  """Whether a row that does not fit would be the same layer as one that does.

  Expert choice is its own limit, so strategies with and without slots are one.
  """
  own, extra = row["router"] == "expert_choice", row["extra"]
  return (
    own
    and extra != "random"
    and f"{row['strategy']}, slots" in STRATEGIES
    and (row["strategy"] != "deduplicated")
  )


def limited(row: Mapping[str, Any]) -> bool:
  """Whether an expert's queue ends somewhere."""
  return row["router"] == "expert_choice" or STRATEGIES[row["strategy"]][1] is LIMITED


def config_of(row: Mapping[str, Any], *, alone: bool = False) -> MoEConfig:
  """A row's layer, over a mesh or as one device runs it."""
  own = row["router"] == "expert_choice"
  used, fields = STRATEGIES[row["strategy"]]
  fields = DROPLESS if own else fields
  listed = [use(losses.router_z, over="mesh"), use(losses.importance)]
  if not own:
    listed += [use(losses.load_balance), use(losses.load_balance, over="sequence")]
  if alone:
    used = use(dispatch.buckets if limited(row) else dispatch.sort)
  return MoEConfig(
    D,
    E,
    **{
      **dict(
        experts=use(experts.glu, d_ff=F, activation=jnp.tanh, bias=True, **MATMUL),
        group_size=GROUP,
        losses=tuple(listed),
        dispatch=used,
        sharding=None if alone else RULES,
      ),
      **fields,
      **ROUTERS[row["router"]],
      **EXTRAS[row["extra"]],
    },
  )


def arrays(config: MoEConfig, extra: str) -> tuple[Any, ...]:
  """Parameters, activations, context and state, with nothing left at zero."""
  r = np.random.default_rng(3)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(r.normal(size=leaf.shape) / 4, jnp.float32),
    param_shapes(config),
  )
  params["gate"] = {"kernel_DE": jnp.asarray(2 * np.eye(D, E), jnp.float32)}
  x = jnp.asarray(r.normal(size=(B, S, D)), jnp.float32)
  valid = None
  if extra == "padding":  # a row, and most of another one
    valid = jnp.asarray(np.arange(B * S).reshape(B, S) % 21 > 9)
  ids = jnp.asarray(r.integers(0, _cases.VOCABULARY, (B, S)), jnp.int32)
  context = Context(valid=valid, token_id=ids)
  return params, x, context, _cases.state_of(config)


def results(config: MoEConfig, extra: str, *, mesh: Any = None) -> dict[str, Any]:
  """Output, gradients and `Info` of a training call; the same keys on any mesh."""
  params, x, context, state = arrays(config, extra)
  found = _program(config)

  def call():
    return found(params, x, context, state, jax.random.key(5))

  with (
    _cases.quickly(),
    contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh),
  ):
    return jax.device_get(call())


@functools.cache
def _program(config: MoEConfig):
  def total(params, x, context, state, key):
    y, info = apply(
      params, x, config, context=context, state=state, key=key, train=True,
      with_plan=True,
    )  # fmt: skip
    plan = info.plan
    kept = (plan.kept, plan.routing.expert, plan.routing.token)
    info = dataclasses.replace(info, plan=None)
    return jnp.sum(jnp.sin(y)) + sum(info.losses.values()), (y, info, kept)

  def every(params, x, context, state, key):
    call = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, (y, info, kept)), (d_params, d_x) = call(params, x, context, state, key)
    return dict(y=y, params=d_params, x=d_x, info=info, kept=kept)

  return jax.jit(every)


@functools.cache
def alone(router: str, strategy: str, extra: str) -> dict[str, Any]:
  """What one device gives; strategies with the same limit share it."""
  row = dict(router=router, strategy=strategy, extra=extra)
  return results(config_of(row, alone=True), extra)


def one_device(row: Mapping[str, Any]) -> dict[str, Any]:
  """The result that a row must have."""
  return alone(row["router"], "buckets" if limited(row) else "sort", row["extra"])


def check(row: Mapping[str, Any]) -> None:
  """Output, all gradients, kept set, losses, load, drops and state are one device's."""
  found = results(config_of(row), row["extra"], mesh=_mesh(row))
  expected = one_device(row)
  kept = found.pop("kept")
  jax.tree.map(assert_close, found, {k: v for k, v in expected.items() if k != "kept"})
  own_numbers = row["strategy"] != "einsum"  # which is one program over all tokens
  chosen = _kept_set(kept, row["mesh"] if own_numbers else "data=1")
  assert len(chosen) and chosen == _kept_set(expected["kept"], "data=1")
  assert np.abs(found["y"]).max() > 0.01


def _kept_set(entries: Any, mesh: str) -> list[tuple[int, int]]:
  """(token, expert) of what was kept, in order; devices number their own tokens."""
  sizes = meshes.parse(mesh, axes=AXES)
  rows = math.prod(sizes.get(axis, 1) for axis in RULES.tokens)
  parts = sizes.get("context", 1)
  kept, expert, token = (np.reshape(a, (rows, parts, -1)) for a in entries)
  whole = np.arange(B * S).reshape(rows, B // rows, parts, S // parts)
  local = whole.swapaxes(1, 2).reshape(rows, parts, -1)
  token = np.take_along_axis(local, token, axis=-1)
  return sorted(zip(token[kept].tolist(), expert[kept].tolist(), strict=True))


def refusal(row: Mapping[str, Any]) -> str:
  """What the error of a row that does not fit says."""
  if row["extra"] == "random":
    return "priority: expert_choice has no choice ranks; use use(priority.by_weight)."
  if row["strategy"].startswith("deduplicated"):
    return (
      "dispatch=deduplicated with router=expert_choice: tokens have no fixed number of "
      "choices to send along; use dispatch.all_to_all or all_gather."
    )
  return "router=expert_choice with dropless dispatch=sort; use dispatch.buckets."


def check_refused(row: Mapping[str, Any]) -> None:
  """A row that does not fit is an error of its configuration or of its tracing."""
  try:
    config = config_of(row)
    given = (*arrays(config, row["extra"]), jax.random.key(5))
    with jax.set_mesh(_mesh(row)):
      jax.eval_shape(_program(config), *given)
  except ValueError as error:
    assert str(error) == refusal(row)
  else:
    raise AssertionError("a layer that nothing can run was configured and traced")


def _mesh(row: Mapping[str, Any]):
  return meshes.make(row["mesh"], axes=AXES, explicit=row["kind"] == "explicit")
