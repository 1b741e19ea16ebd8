"""What the oracle says of a layer of `_cases`, from the library's scores and draws.

Where two float32 scores tie and the real numbers do not, only the library's own scores
tell which expert is best: the oracle is given those, after a comparison with float64.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import layer
from jmoe.config import MoEConfig
from jmoe.noise._keys import per_token
from jmoe.types import Info
from tests import oracle
from tests._cases import CAPACITIES, Drawn, key_of, params_of, state_of


@dataclasses.dataclass
class Expected:
  """What the oracle says of a layer."""

  scores: np.ndarray  # [T,E] of the logits that the library scored
  entries: list[oracle.Entry]
  slot: np.ndarray  # [N], -1 for what does not queue
  kept: np.ndarray  # bool[N]
  load: np.ndarray  # [G,E]
  weights: np.ndarray  # [N] after renormalisation
  y: np.ndarray  # [T,D]
  losses: dict[str, float]
  dropped: dict[str, float]
  entropy: float


def expect(
  row: Mapping[str, Any], config: MoEConfig, drawn: Drawn, info: Info, group=None
) -> Expected:
  """The layer as loops over tokens, from the library's own scores and draws."""
  routing = info.plan.routing
  T, E = routing.probs.shape
  valid, logits = drawn.valid_or_all, np.asarray(routing.logits)
  scored = logits if routing.noisy_logits is None else np.asarray(routing.noisy_logits)
  scores = oracle.SCORES[config.score.name](scored.astype(np.float64))
  group = config.group_size if group is None else group
  S = group or T
  mask = _mask(config, drawn)
  entries = _entries(config, drawn, routing, scored, mask, S)
  entries = [  # a weight is a float32 wherever weights are compared
    dataclasses.replace(e, weight=float(np.float32(e.weight))) for e in entries
  ]

  slots, limit = CAPACITIES[row["capacity"]][1], None
  if slots is not None:
    k = config.k or 1

    def limit(n, e):
      return 0 if n == 0 else slots(n, S, E, k, e)

  limited = row["capacity"] not in ("dropless", "bounded")
  slot, kept, load = oracle.assign(
    entries,
    E,
    T,
    group_size=group if limited else None,
    capacity=limit,
    priority=(
      # What nothing can drop queues in the order of its entries.
      [0.0] * len(entries)
      if row["capacity"] == "dropless"
      else _priority(config, drawn, entries, routing)
    ),
    valid=valid,
  )
  if config.max_rows is not None:
    bound = max(1, int(config.max_rows * len(entries)))
    kept = oracle.drop_overflow(slot, kept, oracle.bounded(load, bound))

  rule, scale = config.renormalise.name, routing.scale
  if config.router.name == "top_2" and rule == "before_dropping":
    # A skipped second choice takes its share along.
    entries = _entries(config, drawn, routing, scored, mask, S, weigh="pair")
    rule = "never"
  # The entries' weights hold the scale already where nothing is divided.
  weights = oracle.renormalise(
    entries, kept, rule, 1.0 if rule == "never" else scale, scored
  )

  params = params_of(config, drawn.scale)
  x = np.where(valid[:, None], drawn.x, 0)  # whatever padding holds
  y = oracle.forward(
    x,
    entries,
    kept,
    weights,
    [expert_fn(params["experts"], e) for e in range(E)],
    scale_input=config.scale == "input",
  )
  if config.shared is not None:
    shared = expert_fn(params["shared"], 0, oracle.gelu)
    y = y + np.stack([shared(one.astype(np.float64)) for one in x])

  scope = np.arange(T) // S
  found = {
    "router_z": oracle.router_z(logits, valid),
    "importance": oracle.importance(oracle.softmax(logits), valid, scope),
  }
  probs = np.asarray(routing.probs, np.float64)
  if any(u.name == "load_balance" for u in config.losses):
    found["load_balance"] = oracle.load_balance(entries, probs, valid)
  if any(u.name == "load" for u in config.losses):
    k = config.k
    found["load"] = oracle.load_vmoe(logits, scored, k, valid=valid, scope=scope)

  return Expected(
    scores=scores,
    entries=entries,
    slot=slot,
    kept=kept,
    load=load,
    weights=weights,
    y=y,
    losses=found,
    dropped=_dropped(config, entries, kept, valid, mask),
    entropy=_entropy(probs, valid),
  )


def _mask(config: MoEConfig, drawn: Drawn) -> np.ndarray | None:
  """bool[T,E] for the domain restriction, by a loop."""
  if not config.restrict:
    return None
  (one,) = config.restrict
  shared, E = one.get("shared"), config.num_experts
  size = (E - shared) // one.get("num_domains")
  assert drawn.domain_id is not None
  return np.array(
    [[e >= E - shared or e // size == d for e in range(E)] for d in drawn.domain_id]
  )


def _entries(
  config, drawn, routing, scored, mask, S, weigh="raw"
) -> list[oracle.Entry]:
  name, valid = config.router.name, drawn.valid_or_all
  T, E = routing.probs.shape
  probs = np.asarray(routing.probs)
  state = state_of(config)
  if name in ("top_k", "noisy_top_k"):
    # Noise can make two logits differ where their scores tie.
    select = scored if name == "noisy_top_k" else probs
    if state.bias is not None:
      select = probs + np.asarray(state.bias)  # in float32, as the library adds it
    scale = config.router.get("scale") if name == "top_k" else 1.0
    return oracle.top_k(scored, probs, select, config.k, mask, valid, scale)
  if name == "top_2":
    policy = config.router.get("policy")
    u, noisy = draws_of(config, drawn, T, E)
    noisy = np.asarray(routing.logits) + noisy  # in float32: at 1e4 that rounds
    return oracle.top_2(
      probs,
      policy,
      u=u,
      gumbel=np.zeros((T, E)),
      logits=noisy,
      threshold=config.router.get("threshold"),
      compare=config.router.get("compare"),
      skipped_holds_slot=config.router.get("skipped_holds_slot"),
      weigh=weigh,
      mask=mask,
      valid=valid,
    )
  if name == "hashed":
    table = np.asarray(state.table)
    if mask is None:
      return oracle.hashed(drawn.token_id, table, valid)
    # PanGu-Sigma: the table counts through the experts of the token's domain.
    allowed = [[e for e in range(E) if mask[t][e]] for t in range(T)]
    chosen = [allowed[t][table[drawn.token_id[t]] % len(allowed[t])] for t in range(T)]
    return oracle.hashed(np.arange(T), chosen, valid, mask)
  if name == "every_expert":
    return oracle.every_expert(probs, mask, valid)
  if name == "expert_choice":
    factor, rule = (config.router.get(n) for n in ("capacity_factor", "rule"))
    counts = [int(valid[g : g + S].sum()) for g in range(0, T, S)]
    own = [
      min(S, oracle.CAPACITY_RULES[rule.__name__](n, E, 1, factor)) if n else 0
      for n in counts
    ]
    return oracle.expert_choice(probs, own, S, valid, mask)
  raise ValueError(name)


def draws_of(config, drawn: Drawn, T: int, E: int) -> tuple[np.ndarray, np.ndarray]:
  """The uniform and the Gumbel draws of a router: f32[T] and f32[T,E]."""
  context = drawn.context()
  key = layer._keys(key_of(drawn), context)["router"]
  return tuple(
    np.asarray(per_token(one, key, context, T))
    for one in (
      lambda k: jax.random.uniform(k, (), jnp.float32),
      lambda k: jax.random.gumbel(k, (E,), jnp.float32),
    )
  )


def _priority(config, drawn: Drawn, entries, routing) -> list[float]:
  name = config.priority.name
  if config.router.name == "expert_choice" and name == "by_choice_rank":
    return [0.0] * len(entries)  # in the order of preference
  if name == "random":
    context, T = drawn.context(), len(drawn.x)
    key = layer._keys(key_of(drawn), context)["assign"]
    k = routing.k
    drawn_TK = per_token(
      lambda key: jax.random.uniform(key, (k,), jnp.float32), key, context, T
    )
    return [float(p) for p in np.asarray(drawn_TK).reshape(-1)]
  return getattr(oracle, name)(entries)


def expert_fn(params, e: int, act=np.tanh):
  """Expert e as a function of one token."""
  one = {name: array[e] for name, array in params.items()}
  return oracle.mlp(
    one["up_EDF"], one["down_EFD"], act, one.get("up_bias_EF"), one.get("down_bias_ED")
  )


def _dropped(config, entries, kept, valid, mask) -> dict[str, float]:
  """Fractions of what valid tokens asked for."""
  live = sum(e.live for e in entries)
  outside = 0
  if mask is not None and config.k is not None:
    outside = sum(bool(valid[e.token] and not mask[e.token][e.expert]) for e in entries)
  asked = max(live + outside, 1)
  lost = sum(e.live and not k for e, k in zip(entries, kept, strict=True))
  limited = config.capacity is not None or config.router.name == "expert_choice"
  cause = "capacity" if limited else "buffer"
  return {cause: lost / asked, "restriction": outside / asked}


def _entropy(probs: np.ndarray, valid: np.ndarray) -> float:
  totals = probs.sum(1, keepdims=True)
  return oracle.entropy_local(probs / np.where(totals > 0, totals, 1), valid)
