"""Sparse layers with drawn contents, for tests of the whole flow.

The gate's matrix is a multiple of the identity, so that a case chooses its logits:
ties, huge ones, tiny ones.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import (
  capacity,
  dispatch,
  experts,
  layer,
  losses,
  priority,
  renormalise,
  restrict,
  routers,
  score,
)
from jmoe.balance import update
from jmoe.config import MoEConfig
from jmoe.types import Context, Info, State
from jmoe.use import Use, use
from tests import oracle

D, F = 8, 5
VOCABULARY = 19
KINDS = (
  "random",
  "ties",
  "huge",
  "tiny",
  "one expert",
  "padding",
  "rows",
  "all padding",
)


# -- what is drawn ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The contents of a case; logits are `scale * x[:, :E]`."""

  x: np.ndarray  # f32[T,D]
  scale: float = 1.0
  valid: np.ndarray | None = None  # bool[T]
  token_id: np.ndarray | None = None  # i32[T]
  domain_id: np.ndarray | None = None  # i32[T]
  seed: int = 0

  @property
  def valid_or_all(self) -> np.ndarray:
    return np.ones(len(self.x), bool) if self.valid is None else self.valid

  def context(self, num_rows: int | None = None) -> Context:
    given = {
      name: None if array is None else jnp.asarray(array)
      for name in ("valid", "token_id", "domain_id")
      for array in [getattr(self, name)]
    }
    return Context(num_rows=num_rows, **given)


def draw(kind: str, T: int, E: int, seed: int = 0, *, mask: bool = True) -> Drawn:
  """A case of one of the `KINDS`; with `mask` false, full validity is None."""
  r = np.random.default_rng(seed)
  x, scale, valid = r.normal(size=(T, D)), 1.0, np.ones(T, bool)
  if kind == "ties":
    x = r.integers(-2, 3, (T, D)) / 2
  elif kind == "huge":
    x, scale = r.integers(-4, 5, (T, D)) / 4, 1e4
  elif kind == "tiny":
    scale = 1e-30
  elif kind == "one expert":
    x[:, r.integers(E)] = 4 + r.random(T)
  elif kind == "padding":
    valid = r.random(T) < 0.6
  elif kind == "rows":  # rows of six tokens, each with its own length
    length = r.integers(0, 7, -(-T // 6))
    valid = (np.arange(T) % 6) < length[np.arange(T) // 6]
  elif kind == "all padding":
    valid = np.zeros(T, bool)
  return Drawn(
    x=x.astype(np.float32),
    scale=scale,
    valid=None if valid.all() and not mask else valid,
    token_id=r.integers(0, VOCABULARY, T).astype(np.int32),
    domain_id=r.integers(0, 3, T).astype(np.int32),
    seed=seed,
  )


# -- what is configured ----------------------------------------------------------------

SOFTMAX, SIGMOID = use(score.softmax), use(score.sigmoid)
# name -> fields of the configuration, given E
ROUTERS: Mapping[str, Callable[[int], dict[str, Any]]] = {
  "top_k 1": lambda E: dict(router=use(routers.top_k, k=1)),
  "top_k 2, bias, scale": lambda E: dict(
    router=use(routers.top_k, k=min(2, E), scale=2.5),
    score=SIGMOID,
    balance=use(update, rate=1e-3),
  ),
  "top_k 2 of relu": lambda E: dict(
    router=use(routers.top_k, k=min(2, E)), score=use(score.relu)
  ),
  "top_k E": lambda E: dict(router=use(routers.top_k, k=E)),
  "noisy_top_k": lambda E: dict(router=use(routers.noisy_top_k, k=min(2, E))),
  "top_2 all": lambda E: dict(router=use(routers.top_2, policy="all")),
  "top_2 random, holds": lambda E: dict(
    router=use(routers.top_2, policy="random", skipped_holds_slot=True)
  ),
  "top_2 random, raw": lambda E: dict(
    router=use(routers.top_2, policy="random", compare="raw", threshold=0.2)
  ),
  "top_2 sampling": lambda E: dict(router=use(routers.top_2, policy="sampling")),
  "top_2 threshold": lambda E: dict(
    router=use(routers.top_2, policy="threshold", threshold=0.35)
  ),
  "top_2 threshold, holds": lambda E: dict(
    router=use(
      routers.top_2, policy="threshold", threshold=0.35, skipped_holds_slot=True
    ),
    score=SIGMOID,
  ),
  "top_2 none": lambda E: dict(router=use(routers.top_2, policy="none")),
  "hashed": lambda E: dict(router=use(routers.hashed, vocab_size=VOCABULARY)),
  "every_expert": lambda E: dict(
    router=use(routers.every_expert), score=use(score.sqrt_softplus)
  ),
  "expert_choice": lambda E: dict(router=use(routers.expert_choice)),
  "expert_choice 1.5": lambda E: dict(
    router=use(routers.expert_choice, capacity_factor=1.5, rule=capacity.vmoe),
    score=SIGMOID,
  ),
}
PRIORITIES = {f.__name__: use(f) for f in (
  priority.by_choice_rank, priority.by_confidence, priority.by_weight, priority.random
)}  # fmt: skip


def _by(rule, factor: float = 1.0, **more) -> Use:
  return use(capacity.by_factor, factor=factor, rule=rule, **more)


def _shares(E: int) -> tuple[float, ...]:
  return tuple((0.5, 1.0, 0.8)[e % 3] for e in range(E))


def _rule(name: str, factor: float = 1.0, **more) -> Callable[..., int]:
  """The oracle's slots of expert e for n tokens in a group of at most S."""

  def slots(n, S, E, k, e):
    del S, e
    return oracle.CAPACITY_RULES[name](n, E, k, factor, **more)

  return slots


def _per_expert(n, S, E, k, e):
  del S
  return oracle.CAPACITY_RULES["ceil"](n, E, k, 1.0 * _shares(E)[e])


# name -> (fields given E, the oracle's slots; None: no limit)
CAPACITIES: Mapping[str, tuple[Callable[[int], dict[str, Any]], Any]] = {
  "ceil": (lambda E: dict(capacity=_by(capacity.ceil)), _rule("ceil")),
  "mesh": (lambda E: dict(capacity=_by(capacity.mesh)), _rule("mesh")),
  "lingvo": (lambda E: dict(capacity=_by(capacity.lingvo)), _rule("lingvo")),
  "flaxformer": (
    lambda E: dict(capacity=_by(capacity.flaxformer, 1.5, minimum=4)),
    _rule("flaxformer", 1.5),
  ),
  "vmoe": (lambda E: dict(capacity=_by(capacity.vmoe, 0.5)), _rule("vmoe", 0.5)),
  "deepspeed": (
    lambda E: dict(capacity=_by(capacity.deepspeed, 0.7, minimum=4)),
    _rule("deepspeed", 0.7),
  ),
  "tutel": (lambda E: dict(capacity=_by(capacity.tutel, 0.6)), _rule("tutel", 0.6)),
  "megablocks": (
    lambda E: dict(capacity=_by(capacity.megablocks, 1.15)),
    _rule("megablocks", 1.15),
  ),
  "megatron": (
    lambda E: dict(capacity=_by(capacity.megatron, 0.8)),
    _rule("megatron", 0.8),
  ),
  "fairseq": (lambda E: dict(capacity=_by(capacity.fairseq)), _rule("fairseq_train")),
  "fairseq_eval": (
    lambda E: dict(capacity=_by(capacity.fairseq_eval, 0.25)),
    _rule("fairseq_eval"),
  ),
  "aligned": (
    lambda E: dict(capacity=_by(capacity.ceil, 0.7, minimum=3, multiple_of=2)),
    _rule("ceil", 0.7, minimum=3, multiple=2),
  ),
  "per expert": (
    lambda E: dict(capacity=_by(capacity.ceil, per_expert=_shares(E))),
    _per_expert,
  ),
  "of all tokens": (
    lambda E: dict(capacity=_by(capacity.ceil, 0.9, count="all")),
    lambda n, S, E, k, e: oracle.CAPACITY_RULES["ceil"](S, E, k, 0.9),
  ),
  "none": (
    lambda E: dict(capacity=use(capacity.fixed, slots=0)),
    lambda n, S, E, k, e: 0,
  ),
  "one": (
    lambda E: dict(capacity=use(capacity.fixed, slots=1)),
    lambda n, S, E, k, e: 1,
  ),
  "dropless": (lambda E: dict(capacity=None), None),
  "bounded": (lambda E: dict(capacity=None, max_rows=0.5), None),
  "own": (lambda E: dict(capacity=None), None),  # of expert choice
}
DISPATCHES = {
  f.__name__: use(f) for f in (dispatch.einsum, dispatch.buckets, dispatch.sort)
}
RENORMALISE = {name: use(getattr(renormalise, name)) for name in oracle.RENORMALISE}
RESTRICTIONS = {"": (), "domain": (use(restrict.domain, num_domains=3, shared=1),)}
EXTRAS = {
  "": dict(),
  "input": dict(scale="input"),
  "shared": dict(shared=use(experts.mlp, d_ff=3)),
  "input, shared": dict(scale="input", shared=use(experts.mlp, d_ff=3)),
}


def expert(**more: Any) -> Use:
  """Two matrices with biases, so that a padding row's output is not zero."""
  return use(experts.mlp, d_ff=F, activation=jnp.tanh, bias=True, **more)


def config_of(row: Mapping[str, Any], E: int, **more: Any) -> MoEConfig:
  """The configuration of a row of factors."""
  own = row["router"].startswith("expert_choice")
  k = {"top_k 1": 1, "hashed": 1}.get(row["router"], 2)
  listed = [use(losses.router_z), use(losses.importance)]
  if not own:
    listed.append(use(losses.load_balance))
  fields = dict(
    experts=expert(),
    dispatch=DISPATCHES[row["dispatch"]],
    priority=PRIORITIES[row.get("priority", "by_choice_rank")],
    renormalise=RENORMALISE[row.get("renormalise", "never")],
    group_size=row.get("group_size"),
    restrict=RESTRICTIONS[row.get("restrict", "") if k <= E else ""],
    losses=tuple(listed),
    **ROUTERS[row["router"]](E),
    **CAPACITIES[row["capacity"]][0](E),
    **EXTRAS[row.get("extra", "")],
  )
  return MoEConfig(D, E, **{**fields, **more})


def params_of(
  config: MoEConfig, scale: float = 1.0, dtype=np.float32
) -> dict[str, Any]:
  """Parameters with non-zero biases, and a gate that copies x to the logits."""
  r = np.random.default_rng(5)

  def leaf(shape):
    return (r.normal(size=shape.shape) / 2).astype(dtype)

  params = jax.tree.map(leaf, layer.param_shapes(config))
  params["gate"] = {"kernel_DE": (scale * np.eye(D, config.num_experts)).astype(dtype)}
  return params


def state_of(config: MoEConfig) -> State:
  """A bias that matters, a table that is not even."""
  r = np.random.default_rng(6)
  bias = table = None
  if config.balance is not None:
    bias = jnp.asarray(r.normal(size=config.num_experts) / 5, jnp.float32)
  if config.router.name == "hashed":
    table = jnp.asarray(r.integers(0, config.num_experts, VOCABULARY), jnp.int32)
  return State(bias=bias, table=table)


def key_of(drawn: Drawn) -> jax.Array:
  return jax.random.key(drawn.seed + 1)


def run(
  config: MoEConfig, drawn: Drawn, *, num_rows: int | None = None, **given: Any
) -> tuple[Any, Info]:
  """The layer in training, with its plan."""
  return layer.moe(
    jax.tree.map(jnp.asarray, params_of(config, drawn.scale)),
    jnp.asarray(drawn.x),
    config,
    context=drawn.context(num_rows),
    state=state_of(config),
    key=key_of(drawn),
    train=True,
    with_plan=True,
    **given,
  )


# -- how it is compiled ----------------------------------------------------------------


@contextlib.contextmanager
def quickly():
  """Compiles with few optimisations: for what runs once or twice on small shapes."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def by_operation():
  """Runs the layer's function as it is written, each operation compiled by itself.

  Operations of one shape are compiled once for all configurations, which makes a new
  configuration twenty times cheaper than compiling its layer.
  """
  compiled = layer._moe
  layer._moe = compiled.__wrapped__
  try:
    with quickly():
      yield
  finally:
    layer._moe = compiled


def enable_x64():
  """`jax.enable_x64` where there is one, else its older home."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  from jax.experimental import enable_x64 as older

  return older(True)
