"""One batch as plain arrays, and every loss of it: by the library and by the oracle."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import losses, score
from jmoe.types import Context, Plan, Routing
from jmoe.use import use
from tests import oracle

LOSSES = {
  "load_balance": use(losses.load_balance),
  "load_balance first": use(losses.load_balance, choices="first"),
  "importance": use(losses.importance),
  "load": use(losses.load),
  "load 0.5": use(losses.load, noise_std=0.5),
  "router_z": use(losses.router_z),
  "entropy_local": use(losses.entropy_local),
  "entropy_local m1": use(losses.entropy_local, modality=1),
  "entropy_global": use(losses.entropy_global),
  "entropy_global m2": use(losses.entropy_global, modality=2, threshold=1.0),
}
AT_BALANCE = {  # with E experts
  "load_balance": lambda E: 1.0,
  "load_balance first": lambda E: 1.0,
  "importance": lambda E: 0.0,
  "load": lambda E: 0.0,
  "load 0.5": lambda E: 0.0,
  "router_z": lambda E: math.log(E) ** 2,
  "entropy_local": lambda E: math.log(E),
  "entropy_local m1": lambda E: math.log(E),
  "entropy_global": lambda E: -math.log(E),
  "entropy_global m2": lambda E: max(0.0, 1.0 - math.log(E)),
}


@dataclasses.dataclass
class Case:
  """Numpy arrays, float64; `row=None` means rows of equal length."""

  logits: np.ndarray  # [T,E]
  noise: np.ndarray | None  # [T,E]
  chosen: np.ndarray  # [T,K]
  live: np.ndarray  # bool[T,K]
  valid: np.ndarray  # bool[T]
  modality: np.ndarray  # [T]
  row: np.ndarray | None
  num_rows: int | None = 4
  group_size: int | None = 5
  score: str = "softmax"

  def replace(self, **fields) -> "Case":
    return dataclasses.replace(self, **fields)


def draw(T: int, E: int, k: int, seed: int = 0, **fields) -> Case:
  """Padding, skipped choices, three modalities; rows of any length, one is empty."""
  r = np.random.default_rng(seed)
  logits, noise = r.normal(size=(T, E)), r.normal(size=(T, E)) / E
  valid = r.random(T) < 0.8
  case = Case(
    logits=logits,
    noise=noise,
    chosen=np.argsort(-(logits + noise), axis=1, kind="stable")[:, :k],
    live=(r.random((T, k)) < 0.9) & valid[:, None],
    valid=valid,
    modality=r.integers(0, 3, T),
    row=np.sort(r.integers(0, 3, T)),
  )
  return case.replace(**fields)


# -- the library -----------------------------------------------------------------------


def arrays(case: Case, dtype=jnp.float32) -> dict:
  """What is traced: everything but sizes."""
  made = dict(
    noise=None if case.noise is None else jnp.asarray(case.noise, dtype),
    chosen=jnp.asarray(case.chosen, jnp.int32),
    live=jnp.asarray(case.live),
    valid=jnp.asarray(case.valid),
    modality=jnp.asarray(case.modality, jnp.int32),
    row=None if case.row is None else jnp.asarray(case.row, jnp.int32),
  )
  return {name: array for name, array in made.items() if array is not None}


def floats(logits, noise, score_name: str) -> dict:
  """The three arrays of a routing that losses differentiate."""
  noisy = {} if noise is None else {"noisy_logits": logits + noise}
  return {"probs": getattr(score, score_name)(logits), "logits": logits, **noisy}


def plan(found, given, *, num_rows, group_size) -> tuple[Plan, Context]:
  """A plan, and its context, with these scores and given choices."""
  T, E = found["logits"].shape
  k = given["chosen"].shape[1]
  idle_N = jnp.zeros(T * k, jnp.int32)
  routing = Routing(
    token=jnp.arange(T * k, dtype=jnp.int32) // k,
    expert=given["chosen"].reshape(-1),
    weight=jnp.ones(T * k, jnp.float32),
    live=given["live"].reshape(-1),
    queues=given["live"].reshape(-1),
    **found,
    k=k,
    group_size=group_size,
  )
  none_GE = jnp.zeros((routing.num_groups, E), jnp.int32)
  context = Context(
    valid=given["valid"],
    row=given.get("row"),
    modality=given["modality"],
    num_rows=num_rows,
  )
  queues = (none_GE, none_GE, none_GE)
  return Plan(routing, idle_N, idle_N, idle_N < 0, *queues), context


def sizes(case: Case) -> dict:
  return dict(num_rows=case.num_rows, group_size=case.group_size)


def args(case: Case) -> tuple[Plan, Context]:
  """What a loss takes, in float32."""
  given = arrays(case)
  logits = jnp.asarray(case.logits, jnp.float32)
  return plan(floats(logits, given.get("noise"), case.score), given, **sizes(case))


@functools.partial(jax.jit, static_argnames=("over", "num_rows", "group_size"))
def _evaluate(found, given, *, over, **sizes):
  values, gradients = {}, {}
  for name, loss in LOSSES.items():

    def value(found, loss=loss):
      return loss.replace(over=over)(*plan(found, given, **sizes))

    values[name], gradients[name] = jax.value_and_grad(value)(found)
  return values, gradients


@functools.partial(jax.jit, static_argnames="score_name")
def _chain(logits, noise, gradients, *, score_name):
  _, pull = jax.vjp(lambda logits: floats(logits, noise, score_name), logits)
  return jax.tree.map(lambda g: pull(g)[0], gradients, is_leaf=lambda g: "probs" in g)


def evaluate(case: Case, over: str, dtype=jnp.float32) -> tuple[dict, dict]:
  """Values by name, and gradients by name and array; compiled once a size."""
  given, logits = arrays(case, dtype), jnp.asarray(case.logits, dtype)
  found = jax.jit(floats, static_argnums=2)(logits, given.get("noise"), case.score)
  return _evaluate(found, given, over=over, **sizes(case))


def by_logits(case: Case, gradients: dict, dtype=jnp.float32) -> dict:
  """Gradients by name, with respect to the logits."""
  logits, noise = jnp.asarray(case.logits, dtype), arrays(case, dtype)["noise"]
  return _chain(logits, noise, gradients, score_name=case.score)


# -- the oracle ------------------------------------------------------------------------


def scope_of(case: Case, over: str) -> np.ndarray:
  """The scope that each token belongs to."""
  tokens = np.arange(len(case.logits))
  if over == "sequence":
    return tokens * case.num_rows // len(tokens) if case.row is None else case.row
  if over == "group" and case.group_size:
    return tokens // case.group_size
  return np.zeros(len(tokens), int)


def expected(case: Case, name: str, over: str) -> float:
  """The loss by loops over tokens, float64."""
  loss = LOSSES[name]
  keywords, kind = loss.kwargs, loss.name
  modality = keywords.pop("modality", None)
  scope, valid, logits = scope_of(case, over), case.valid, case.logits
  probs = oracle.SCORES[case.score](logits)
  if kind == "load_balance":
    entries = [
      oracle.Entry(t, int(e), 1.0, bool(case.live[t, i]), True)
      for t, row in enumerate(case.chosen)
      for i, e in enumerate(row)
    ]
    return oracle.load_balance(entries, probs, valid, scope=scope, **keywords)
  if kind == "importance":
    return oracle.importance(oracle.softmax(logits), valid, scope)
  if kind == "load":
    noisy, k = logits + case.noise, case.chosen.shape[1]
    return oracle.load_vmoe(logits, noisy, k, valid=valid, scope=scope, **keywords)

  if modality is not None:
    valid = valid & (case.modality == modality)
  probs = probs / probs.sum(1, keepdims=True)
  scopes = [valid & (scope == s) for s in sorted(set(scope[valid]))]
  of_scope = {
    "router_z": lambda inside: oracle.router_z(logits, inside),
    "entropy_local": lambda inside: oracle.entropy_local(probs, inside),
    "entropy_global": lambda inside: oracle.entropy_global(probs, inside, **keywords),
  }[kind]
  return float(np.mean([of_scope(inside) for inside in scopes])) if scopes else 0.0
