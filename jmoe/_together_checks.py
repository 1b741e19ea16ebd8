"""Whether the fields of a `MoEConfig`, each right by itself, can work together."""
# SPDX-License-Identifier: Apache-2.0

from typing import Any

from jmoe._value_checks import finite_positive, whole
from jmoe.losses.total import loss_name
from jmoe.use import Use, fact, shown

_MANY = ("restrict", "losses")
_NOT_SOFT = ("logit_noise", "select_noise", "restrict", "capacity", "max_rows")
_NOT_SOFT += ("aggregate", "losses", "balance")


def together(config: Any) -> None:
  """Raises if the fields of a `MoEConfig` contradict each other."""
  name, dispatch = config.router.name, config.dispatch.name
  if config.scale not in ("output", "input"):
    raise ValueError(f"scale={shown(config.scale)}; use 'output' or 'input'.")
  group = config.group_size
  if group is not None and group != "row":
    _group_size(group)
  if (config.aggregate is not None) != bool(fact(config.combine, "stacks")):
    raise ValueError(
      f"combine={config.combine!r} with aggregate={config.aggregate!r}: an aggregation "
      "needs combine=use(combine.stack), and nothing else does."
    )
  if config.shared is None and config.join.name != "add":
    raise ValueError(
      f"join={config.join!r} without a shared expert joins nothing; give "
      "shared=use(experts.glu, d_ff=...), or leave join out."
    )
  dense = bool(fact(config.router, "dense"))
  for use, field in ((config.gate, "gate"), (config.dispatch, "dispatch")):
    if bool(fact(use, "dense")) != dense:
      raise ValueError(
        f"{field}={use.name} with router={name}: gates.slots, routers.soft and "
        "dispatch.mix go together, and with no others."
      )
  if dense:
    for field in _NOT_SOFT:
      if getattr(config, field):
        raise ValueError(
          f"{field}={getattr(config, field)!r} with router={name}: Soft MoE has none; "
          f"use {field}={'()' if field in _MANY else 'None'}."
        )
    if config.scale == "input":
      raise ValueError(f"scale='input' with router={name}; use 'output'.")
    return
  _limits(config, name, dispatch)
  _unread(config, name)
  _restrictions(config)
  own = config.k is None
  for loss in config.losses:
    if own and not fact(loss, "any_router"):
      raise ValueError(
        f"losses: {loss.name} does not fit router={name}, which balances itself; "
        "use losses=() or router_z."
      )
    remedy = fact(loss, "fits", lambda config, **_: None)(config, **loss.kwargs)
    if remedy:
      raise ValueError(f"losses: {loss.name} does not fit: {remedy}")
  if own and config.balance is not None:
    raise ValueError(f"balance with router={name}, which balances itself; use None.")
  if config.losses and fact(config.gate, "constant"):
    raise ValueError(
      f"losses={shown(config.losses)} with gate={config.gate.name}, whose logits are "
      "constant: nothing learns from them; use losses=()."
    )
  names = [loss_name(loss) for loss in config.losses]
  if len(set(names)) != len(names):
    twice = next(n for n in names if names.count(n) > 1)
    raise ValueError(
      f"losses={config.losses!r}: two are named {twice!r}; leave one out."
    )


def in_turn(restrict: tuple[Use, ...]) -> list[tuple[int, Use]]:
  """Restrictions with their places, in the order in which the layer asks them."""
  return sorted(enumerate(restrict), key=lambda placed: bool(fact(placed[1], "within")))


def _restrictions(config: Any) -> None:
  """Raises if the restrictions together leave a token too few experts.

  A domain is the token's own: one of them must do, and who is in another is counted as
  dropped.  Which groups of experts are best is anyone's guess: each choice must do.
  """
  if len(config.restrict) < 2:
    return  # each has checked itself
  E, needed = config.num_experts, config.k or 1
  given, guessed = [frozenset(range(E))], []
  for _, use in in_turn(config.restrict):
    leaves = fact(use, "leaves")
    if leaves is None:
      continue  # it does not say; it can only allow less
    if fact(use, "within"):
      guessed.append((leaves, use.kwargs))
    else:
      given = [left for one in given for left in leaves(one, E, **use.kwargs)]

  def fewest(allowed: frozenset[int]) -> int:
    left = {allowed}
    for leaves, kwargs in guessed:
      left = {after for one in left for after in leaves(one, E, **kwargs)}
    return min(map(len, left))

  most = max(map(fewest, given))
  if most < needed:
    raise ValueError(
      f"restrict={shown(config.restrict)}: together they leave a token {most} experts, "
      f"fewer than the {needed} it needs; allow more, or leave one out."
    )


def _group_size(value: Any) -> None:
  if not whole(value):
    raise ValueError(
      f"group_size={shown(value)} must be a whole number of at least 1, 'row' or None."
    )


def _unread(config: Any, name: str) -> None:
  """Raises on a stage whose result the router does not read."""
  reads = fact(config.router, "reads", ("scores", "select"))
  ignored = {
    "select": (("balance", None), ("select_noise", None)),
    "scores": (("logit_noise", None), ("score", "softmax")),
  }
  for what, fields in ignored.items():
    for field, plain in fields if what not in reads else ():
      value = getattr(config, field)
      if value is not None and value.name != plain:
        instead = "None" if plain is None else f"use(score.{plain})"
        raise ValueError(
          f"{field}={value!r} has no effect with router={name}; use "
          f"{field}={instead}, or another router (routers.top_k)."
        )


def _limits(config: Any, name: str, dispatch: str) -> None:
  """What capacity, its absence and a bounded buffer allow."""
  own = config.k is None  # the choice is the capacity
  dropless = fact(config.dispatch, "dropless")
  if own and config.capacity is not None:
    raise ValueError(
      f"capacity={config.capacity!r} with router={name}: its choice is the capacity; "
      "set capacity_factor there and capacity=None."
    )
  if dropless and own:
    raise ValueError(
      f"router={name} with dropless dispatch={dispatch}; use dispatch.buckets."
    )
  if dropless and config.capacity is not None:
    raise ValueError(
      f"capacity={config.capacity!r} with dropless dispatch={dispatch}; use "
      "dispatch.buckets, or capacity=None to drop nothing."
    )
  if dropless is False and config.capacity is None and not own:
    raise ValueError(
      f"dispatch={dispatch} needs a capacity; give capacity=use(capacity.by_factor, "
      "factor=1.25), or use dispatch.sort (dropless)."
    )
  if config.max_rows is None:
    return
  if dropless is False or config.capacity is not None:
    raise ValueError(
      f"max_rows={shown(config.max_rows)} bounds a dropless buffer, but "
      f"dispatch={dispatch} has a capacity; use max_rows=None."
    )
  finite_positive("max_rows", config.max_rows, ", a share of all assignments")
  if config.max_rows > 1:
    raise ValueError(
      f"max_rows={config.max_rows} is a share of all assignments; use 0 to 1."
    )
