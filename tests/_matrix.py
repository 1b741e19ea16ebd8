"""Combinations of stages: which fit, all of them, and few that hold every pair."""
# SPDX-License-Identifier: Apache-2.0

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests._cases import (
  CAPACITIES,
  DISPATCHES,
  EXTRAS,
  KINDS,
  PRIORITIES,
  RENORMALISE,
  RESTRICTIONS,
  ROUTERS,
)

FACTORS: Mapping[str, Sequence[Any]] = {
  "router": tuple(ROUTERS),
  "capacity": tuple(CAPACITIES),
  "priority": tuple(PRIORITIES),
  "dispatch": tuple(DISPATCHES),
  "renormalise": tuple(RENORMALISE),
  "group_size": (5,),  # 13 tokens: two groups, and a part of one
  "extra": tuple(EXTRAS),
  "restrict": tuple(RESTRICTIONS),
  "kind": KINDS,
}


def fits(row: Mapping[str, Any]) -> bool:
  """Whether a row of the product, or part of one, can be configured."""
  get = dict.fromkeys(FACTORS) | dict(row)
  router, slots = get["router"], get["capacity"]
  if router is not None and slots is not None:
    if router.startswith("expert_choice") != (slots == "own"):
      return False
  own = slots == "own" or str(router).startswith("expert_choice")
  dropless = slots in ("dropless", "bounded")
  if get["dispatch"] == "sort" and (own or slots not in (None, "dropless", "bounded")):
    return False
  if dropless and get["dispatch"] not in (None, "sort"):
    return False
  if own and get["priority"] not in (None, "by_choice_rank", "by_weight"):
    return False
  if own and get["renormalise"] not in (None, "never"):
    return False
  if not _learns(router, get["renormalise"]):
    return False
  return not (router in ("top_k E", "every_expert") and get["restrict"] == "domain")


def _learns(router: str | None, renormalise: str | None) -> bool:
  """Whether the weights of a token are more than one constant."""
  if router == "top_k 1":
    return renormalise in (None, "never")
  if router == "top_2 none":
    return renormalise not in ("after_dropping", "over_chosen", "ones")
  return renormalise != "ones" or router in (None, "hashed")


def product(*names: str, **fixed: Any) -> Iterator[dict[str, Any]]:
  """Every row that fits over the named factors."""
  for values in itertools.product(*(FACTORS[name] for name in names)):
    row = {**dict(zip(names, values, strict=True)), **fixed}
    if fits(row):
      yield row


def covering(
  factors: Mapping[str, Sequence[Any]],
  fits: Callable[[Mapping[str, Any]], bool] = fits,
) -> list[dict[str, Any]]:
  """Few rows that hold every pair of values which fits: a greedy pairwise array."""
  order = {name: i for i, name in enumerate(factors)}

  def pairs(row) -> set:
    items = sorted(row.items(), key=lambda item: order[item[0]])
    return set(itertools.combinations(items, 2))

  left = {}  # ordered, so that every run has the same rows
  for a, b in itertools.combinations(factors, 2):
    for values in itertools.product(factors[a], factors[b]):
      pair = {a: values[0], b: values[1]}
      if fits(pair) and _complete(pair, factors, fits) is not None:
        left[next(iter(pairs(pair)))] = None
  rows = []
  while left:
    row = dict(next(iter(left)))
    for name, values in factors.items():
      if name in row:
        continue
      best = [
        (
          sum(p in left for p in pairs({**row, name: v})),
          -(i + len(rows)) % len(values),
        )
        for i, v in enumerate(values)
      ]
      ranked = sorted(range(len(values)), key=lambda i: best[i], reverse=True)
      for i in ranked:
        trial = {**row, name: values[i]}
        if fits(trial) and _complete(trial, factors, fits) is not None:
          row = trial
          break
    for pair in pairs(row):
      left.pop(pair, None)
    rows.append(row)
  return rows


def _complete(row: dict[str, Any], factors, fits) -> dict[str, Any] | None:
  """The row with values for the other factors, if there are any that fit."""
  missing = [name for name in factors if name not in row]
  if not missing:
    return row
  for value in factors[missing[0]]:
    trial = {**row, missing[0]: value}
    if fits(trial):
      whole = _complete(trial, factors, fits)
      if whole is not None:
        return whole
  return None
