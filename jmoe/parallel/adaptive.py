"""One layout of parameters, and the way to run it that costs least for a call's sizes.

Tutel's adaptive parallelism (arXiv 2206.03382, section 3.1): parameters lie split by
experts and by hidden layers, and whether matrices come to the tokens, tokens go to the
experts and by which exchange, or tokens go to experts that share their hidden layers is
chosen by shape.  Nothing moves when the choice changes: specs of parameters are the
same for all.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jmoe import dispatch
from jmoe.parallel import costs as costs_of
from jmoe.parallel.rules import Rules, product
from jmoe.use import Use, fact, use


class Rates(NamedTuple):
  """What a device does in a second: FLOPs, and bytes to others by its links."""

  flops: float
  link: float
  # Collective ("all_gather", "reduce_scatter", "all_reduce", "all_to_all",
  # "ragged_all_to_all") -> the share of the links that it reaches; 1 if not listed.
  shares: Mapping[str, float] = types.MappingProxyType({})


class Choice(NamedTuple):
  """A way to run a layer, and what it costs."""

  name: str  # "data", "expert" or "expert_tensor"
  tokens: tuple[str, ...]  # mesh axes that split the tokens
  dispatch: Use
  seconds: float  # of a forward and a backward pass of one layer


def costs(
  config: Any,
  num_tokens: int,
  sizes: Mapping[str, int],
  rates: Rates,
  *,
  dtype: Any = "bfloat16",
  num_rows: int | None = None,
) -> list[Choice]:
  """All ways to run a layer, the cheapest first; among equals the simplest.

  The time of the products plus that of the bytes that leave a device
  (`jmoe.parallel.costs`), nothing hidden behind anything: all ways multiply as much, so
  that bytes decide, but for devices that share a hidden layer and so its tokens.

  Args:
    config: a layer with a table; its capacity, if any, counts as rows.
    num_tokens: of the whole batch.
    sizes: of the mesh.
    rates: of a device.
    dtype: of what travels.
    num_rows: B of activations `[B,S,D]`, whose rows are split whole; None: any tokens.

  Returns:
    A choice for each way and strategy that the table allows, and that can divide the
    tokens, their rows and groups of `group_size`.

  Raises:
    ValueError: none can.
  """
  rules: Rules = config.sharding
  experts, tensor = rules.axes("expert", sizes), rules.axes("d_ff", sizes)
  rest = tuple(
    a for a in rules.axes("tokens", sizes) if a not in (*experts, *tensor)
  ) + rules.axes("sequence", sizes)
  E, D, F, matrices = _widths(config)
  item = jnp.dtype(dtype).itemsize
  n, t = product(experts, sizes), product(tensor, sizes)
  fsdp = product(rules.axes("d_model", sizes), sizes)
  k, factor = float(config.k or 1), 1.0
  if config.capacity is not None:
    factor = config.capacity.kwargs.get("factor", 1.0)
  weights = E * D * F * matrices * item
  local = use(dispatch.sort if config.capacity is None else dispatch.buckets)

  def choice(name: str, gathered: tuple[str, ...], used: Use) -> Choice:
    """The way that gathers matrices over some axes, which then split tokens."""
    tokens = (*rest, *experts, *(a for a in tensor if a in gathered))
    T = num_tokens / product(tokens, sizes)
    hidden = t if not set(tensor) <= set(gathered) else 1
    over = product(gathered, sizes) * fsdp
    whole = weights / (n * t * fsdp) * over
    sent = costs_of.gathered(whole, whole, over)
    if fact(used, "exchanges") and n > 1:
      inside = sizes[experts[-1]]
      layer = costs_of.Sizes(T, k, D, item, n, inside, factor)
      sent += costs_of.STRATEGIES[used.name](layer)
    if hidden > 1:
      part = 2 * T * D * item * (hidden - 1) / hidden
      sent.append(costs_of.Sent("partial sums", "all_reduce", part, 2, 0))
    flops = 3 * 2 * T * k * factor * D * F * matrices / hidden
    away = costs_of.seconds(sent, rates.link, rates.shares)
    return Choice(name, tokens, used, flops / rates.flops + away)

  found = [choice("data", (*experts, *tensor), local)]
  if n > 1:
    found += [choice("expert", tensor, used) for used in strategies(config, sizes)]
  if t > 1:
    carriers = strategies(config, sizes) if n > 1 else [local]
    found += [choice("expert_tensor", (), used) for used in carriers]
  fitting = [c for c in found if _divides(c, config, num_tokens, num_rows, sizes)]
  if not fitting:
    least = min(product(c.tokens, sizes) for c in found)
    raise ValueError(
      f"adaptive: num_tokens={num_tokens}, num_rows={num_rows} and group_size="
      f"{config.group_size!r} cannot be divided over {dict(sizes)}; use multiples of "
      f"{least} or fewer devices."
    )
  return sorted(fitting, key=lambda c: c.seconds)


def _divides(
  choice: Choice,
  config: Any,
  num_tokens: int,
  num_rows: int | None,
  sizes: Mapping[str, int],
) -> bool:
  """Whether shards are whole, as a layer over a mesh wants them."""
  parts = product(choice.tokens, sizes)
  sequence = config.sharding.axes("sequence", sizes)
  of_rows = product([a for a in choice.tokens if a not in sequence], sizes)
  if num_tokens % parts or (num_rows is not None and num_rows % of_rows):
    return False
  size = config.group_size
  limited = config.capacity is not None and isinstance(size, int)
  return not limited or num_tokens // parts % size == 0


def strategies(config: Any, sizes: Mapping[str, int]) -> list[Use]:
  """The exchanges that a layer may run with over its expert axes, simplest first."""
  found = []
  if config.capacity is not None:
    found.append(dispatch.all_to_all)
    if len(config.sharding.axes("expert", sizes)) > 1:
      found.append(dispatch.hierarchical)
  found.append(dispatch.all_gather)
  if config.k is not None:
    found.append(dispatch.deduplicated)
  if config.k is not None or config.capacity is None:
    found.append(dispatch.ragged_all_to_all)
  return [use(function) for function in found]


def choose(
  config: Any,
  num_tokens: int,
  sizes: Mapping[str, int],
  rates: Rates,
  *,
  dtype: Any = "bfloat16",
  num_rows: int | None = None,
) -> Any:
  """The configuration with the cheapest way; parameters stay where they are.

  Args and errors: as for `costs`.
  """
  best = costs(config, num_tokens, sizes, rates, dtype=dtype, num_rows=num_rows)[0]
  return as_chosen(config, best, sizes)


def as_chosen(config: Any, choice: Choice, sizes: Mapping[str, int]) -> Any:
  """The configuration that runs in a certain way."""
  sequence = config.sharding.axes("sequence", sizes)
  tokens = tuple(a for a in choice.tokens if a not in sequence)
  rules = dataclasses.replace(config.sharding, tokens=tokens)
  return dataclasses.replace(config, sharding=rules, dispatch=choice.dispatch)


def _widths(config: Any) -> tuple[int, int, int, int]:
  """E, D, F and how many matrices an expert has."""
  d_ff, matrices = config.experts.kwargs.get("d_ff"), fact(config.experts, "matrices")
  if d_ff is None or matrices is None:
    raise ValueError(
      f"adaptive: experts={config.experts!r} do not say their width and how many "
      "matrices they have; use experts.glu, experts.mlp or experts.clamped_glu."
    )
  return config.num_experts, config.d_model, d_ff, matrices
