"""One layout of parameters, and the way to run it that costs least for a call's sizes.

Tutel's adaptive parallelism (arXiv 2206.03382, section 3.1): parameters lie split by
experts and by hidden layers, and whether matrices come to the tokens, tokens go to the
experts and by which exchange, or tokens go to experts that share their hidden layers is
chosen by shape.  Nothing moves when the choice changes: specs of parameters are the
same for all.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from jmoe import dispatch
from jmoe._mesh_checks import multiples, of_shape
from jmoe._value_checks import finite_positive, float_type, positive, table_of
from jmoe.parallel import costs as costs_of, mesh as meshes
from jmoe.parallel.rules import Rules, product
from jmoe.use import Use, fact, use


class Rates(NamedTuple):
  """What a device does in a second: FLOPs, and bytes to others by its links."""

  flops: float
  link: float
  # Collective ("all_gather", "reduce_scatter", "all_reduce", "all_to_all",
  # "ragged_all_to_all") -> the share of the links that it reaches; 1 if not listed.  A
  # gather's or scatter's grows with the devices: each copies its own part as well.
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
  sizes: str | Mapping[str, int] | Mesh | AbstractMesh,
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
    sizes: of the mesh, as for `mesh.parse`, or a mesh.
    rates: of a device.
    dtype: of what travels.
    num_rows: B of activations `[B,S,D]`, whose rows are split whole; None: any tokens.

  Returns:
    A choice for each way and strategy that the table allows, and with which the layer
    takes such activations: it divides the tokens, their rows, sequences and groups.

  Raises:
    ValueError: there is none; a configuration without a table, a mesh that cannot be
      parsed, numbers that are not positive, or a dtype that is no float.
    TypeError: a configuration or sizes of another type.
  """
  rules: Rules = table_of("adaptive", config)
  sizes = _sizes(config, sizes)
  _check(num_tokens, num_rows, rates)
  experts, sequence = rules.axes("expert", sizes), rules.axes("sequence", sizes)
  features = rules.axes("d_ff", sizes)
  # Where an axis splits sequences too, hidden layers are gathered over it in all ways.
  tensor = tuple(a for a in features if a not in sequence)
  rest = tuple(
    a for a in rules.axes("tokens", sizes) + sequence if a not in (*experts, *tensor)
  )
  E, D, F, matrices = _widths(config)
  item = float_type("adaptive: dtype", dtype).itemsize
  n, t = product(experts, sizes), product(tensor, sizes)
  fsdp = product(rules.axes("d_model", sizes), sizes)
  fsdp *= product([a for a in features if a in sequence], sizes)
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
  given = num_tokens, num_rows, config.group_size
  refused = {c: _refused(config, c, sizes, *given) for c in found}
  fitting = [c for c in found if refused[c] is None]
  if not fitting:
    last = found[-1]  # has the fewest shards of tokens, so it asks the least
    raise ValueError(_remedy(config, last, sizes, given, refused[last]))
  return sorted(fitting, key=lambda c: c.seconds)


def _refused(
  config: Any,
  choice: Choice,
  sizes: Mapping[str, int],
  num_tokens: int,
  num_rows: int | None,
  group_size: int | str | None,
) -> str | None:
  """What a layer says to activations of such sizes; None: it takes them."""
  if num_tokens % (num_rows or 1):
    return f"num_rows={num_rows} does not divide num_tokens={num_tokens}."
  lead = (num_tokens,) if num_rows is None else (num_rows, num_tokens // num_rows)
  try:
    config = dataclasses.replace(config, group_size=group_size)
    shape = (*lead, config.d_model)
    of_shape(as_chosen(config, choice, sizes), shape, "float32", sizes)
  except ValueError as error:
    return str(error)
  return None


def _remedy(
  config: Any,
  choice: Choice,
  sizes: Mapping[str, int],
  given: tuple[Any, ...],
  reason: str | None,
) -> str:
  """Which sizes a way cannot take, and the nearest that it can."""
  names = "num_tokens", "num_rows", "group_size"
  fits = [new for new in _near(config, choice, sizes, *given)
          if _refused(config, choice, sizes, *new) is None]  # fmt: skip
  changes = [{n: v for n, v, w in zip(names, new, given, strict=True) if v != w}
             for new in fits]  # fmt: skip
  if not changes:
    return f"adaptive: no way can run over {dict(sizes)}: {reason}"
  least = [c for c in changes if len(c) == min(map(len, changes))]
  texts = [" with ".join(f"{n}={v}" for n, v in c.items()) for c in least]
  texts = list(dict.fromkeys(texts))[:4]
  failing = [f"{n}={v!r}" for n, v in zip(names, given, strict=True)
             if any(n in c for c in least)]  # fmt: skip
  return (
    f"adaptive: {' and '.join(failing)} cannot be divided over {dict(sizes)}; use "
    f"{' or '.join(texts)}, or fewer devices."
  )


def _near(
  config: Any,
  choice: Choice,
  sizes: Mapping[str, int],
  num_tokens: int,
  num_rows: int | None,
  group_size: int | str | None,
) -> Iterator[tuple[int, int | None, int | str | None]]:
  """Sizes near those of a call, which may fit: tokens, rows and a group's tokens."""
  sequence = config.sharding.axes("sequence", sizes)
  parts = product(choice.tokens, sizes)
  of_row = 1 if num_rows is None else product(sequence, sizes)
  near_rows = [] if num_rows is None else multiples(num_rows, parts // of_row)
  for rows in dict.fromkeys([num_rows, *near_rows]):
    whole = math.lcm(parts, (rows or 1) * of_row)
    group = group_size if isinstance(group_size, int) else 1
    near = multiples(num_tokens, whole) + multiples(num_tokens, whole * group)
    for tokens in dict.fromkeys([num_tokens, *near]):
      yield tokens, rows, group_size
      run = tokens // (rows or 1) // of_row if of_row > 1 else tokens // parts
      most = min(run, group_size) if isinstance(group_size, int) else run
      if most > 0:
        yield tokens, rows, next(d for d in range(most, 0, -1) if run % d == 0)


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
  sizes: str | Mapping[str, int] | Mesh | AbstractMesh,
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


def as_chosen(
  config: Any,
  choice: Choice,
  sizes: str | Mapping[str, int] | Mesh | AbstractMesh,
) -> Any:
  """The configuration that runs in a certain way."""
  sizes = _sizes(config, sizes)
  sequence = config.sharding.axes("sequence", sizes)
  tokens = tuple(a for a in choice.tokens if a not in sequence)
  # A mesh's axes of size 1 stay named: the layer refuses a table that names no axis.
  tokens += tuple(a for a in config.sharding.tokens if sizes.get(a) == 1)
  rules = dataclasses.replace(config.sharding, tokens=tokens)
  return dataclasses.replace(config, sharding=rules, dispatch=choice.dispatch)


def _sizes(config: Any, sizes: Any) -> dict[str, int]:
  known = dict.fromkeys((*meshes.AXES, *config.sharding.named))
  return meshes.sizes_of(sizes, tuple(known))


def _check(num_tokens: int, num_rows: int | None, rates: Rates) -> None:
  positive("adaptive: num_tokens", num_tokens)
  if num_rows is not None:
    positive("adaptive: num_rows", num_rows)
  remedy = " a second, as in Rates(flops=600e12, link=300e9)"
  finite_positive("adaptive: rates.flops", rates.flops, remedy)
  finite_positive("adaptive: rates.link", rates.link, remedy)
  for name, share in rates.shares.items():
    finite_positive(f"adaptive: rates.shares[{name!r}]", share)


def _widths(config: Any) -> tuple[int, int, int, int]:
  """E, D, F and how many matrices an expert has."""
  d_ff, matrices = config.experts.kwargs.get("d_ff"), fact(config.experts, "matrices")
  if d_ff is None or matrices is None:
    raise ValueError(
      f"adaptive: experts={config.experts!r} do not say their width and how many "
      "matrices they have; use experts.glu, experts.mlp or experts.clamped_glu."
    )
  return config.num_experts, config.d_model, d_ff, matrices
