"""What is compared: functions from a run to the same run with one thing changed.

An arm is a name, or `name=value`:

  sparse        the run as it is
  dense         the dense model of equal active FLOPs
  experts=N     N experts of the same active FLOPs; one expert is a dense layer
  finer=N       N times as many experts a token takes, and there are; each 1/N as wide
  dag=L         DAG-MoE's L rounds of messages among a token's experts, SiLU edges;
                dag=L-sigmoid  their edges sigmoid; dag=L-ungated  without edges
  shared=L      a shared expert of as many parameters as dag=L has for its messages;
                shared=L-flops  of as many FLOPs a token
  steps=F       the run as it is, planned to end after a share F of its steps
  balance=none  no balancing at all
  balance=loss  by the load-balance loss that the run has
  balance=bias  by DeepSeek-V3's bias instead of the loss
  balance=sequence  by the loss within each row instead of over all of them
  pool=none     without EMO's pools of documents, and all else as it was
  pool=N        pools of N experts for every document; pool=N+  of N or more
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Callable

import jax

from experiments.config import Run
from jmoe import aggregate, balance, combine, losses, restrict
from jmoe.analysis import cost
from jmoe.config import BlockConfig, Dense, ModelConfig, MoEConfig
from jmoe.layer import param_shapes
from jmoe.use import nearest, use

_LOSS = "load_balance"


def arm(run: Run, text: str) -> Run:
  """The run of an arm; its name becomes that of the arm.

  Raises:
    ValueError: no such arm (with the nearest), or a value that it does not take.
  """
  name, equals, value = text.partition("=")
  if name not in _ARMS:
    raise ValueError(f"--arms {text}: unknown arm {name!r}; {nearest(name, _ARMS)}")
  changed = _ARMS[name](run, value if equals else None)
  return dataclasses.replace(changed, name=text)


def _sparse(run: Run, value: str | None) -> Run:
  _no_value("sparse", value)
  return run


def _dense(run: Run, value: str | None) -> Run:
  _no_value("dense", value)
  model = cost.equal_active_flops(run.model)
  return dataclasses.replace(run, model=model, loss_weights=())


def _experts(run: Run, value: str | None) -> Run:
  if value is None or not value.isdecimal() or not int(value):
    raise ValueError(f"--arms experts={value}: give the number of experts, >= 1.")
  number = int(value)

  def change(ff: MoEConfig) -> MoEConfig:
    k = min(ff.k or 1, number)
    wide = ff.experts.get("d_ff") * (ff.k or 1) // k
    return dataclasses.replace(
      ff,
      num_experts=number,
      router=ff.router.replace(k=k),
      experts=ff.experts.replace(d_ff=wide),
    )

  return dataclasses.replace(run, model=_layers(run.model, change))


def _finer(run: Run, value: str | None) -> Run:
  if value is None or not value.isdecimal() or not int(value):
    raise ValueError(f"--arms finer={value}: give a whole number, >= 1.")
  times = int(value)

  def change(ff: MoEConfig) -> MoEConfig:
    wide = ff.experts.get("d_ff")
    if ff.k is None or wide % times:
      raise ValueError(
        f"--arms finer={value}: experts of width {wide} and k={ff.k} do not split "
        f"into {value}; give a divisor of the width, and a router with a k."
      )
    return dataclasses.replace(
      ff,
      num_experts=ff.num_experts * times,
      router=ff.router.replace(k=ff.k * times),
      experts=ff.experts.replace(d_ff=wide // times),
    )

  return dataclasses.replace(run, model=_layers(run.model, change))


_EDGES = {
  "silu": dict(activation=jax.nn.silu),
  "sigmoid": dict(activation=jax.nn.sigmoid),
  "ungated": dict(gated=False),
}


def _dag(run: Run, value: str | None) -> Run:
  rounds, edges = _rounds("dag", value, {"": "silu", **{name: name for name in _EDGES}})
  model = _layers(run.model, lambda ff: _with_messages(ff, rounds, edges))
  return dataclasses.replace(run, model=model)


def _with_messages(ff: MoEConfig, rounds: int, edges: str) -> MoEConfig:
  """A layer with messages a quarter as wide as tokens, as the paper's are."""
  messages = use(
    aggregate.dag,
    d_message=max(1, ff.d_model // 4),
    num_rounds=rounds,
    **_EDGES[edges],
  )
  return dataclasses.replace(ff, combine=use(combine.stack), aggregate=messages)


def _shared(run: Run, value: str | None) -> Run:
  rounds, what = _rounds("shared", value, {"": "parameters", "flops": "flops"})

  def change(ff: MoEConfig) -> MoEConfig:
    if ff.shared is not None:
      raise ValueError(
        f"--arms shared={value}: the layers have a shared expert already."
      )
    messages = _with_messages(ff, rounds, "silu")
    if what == "flops":
      more = cost.feed_forward_flops(messages, ff.d_model)
      more = (more - cost.feed_forward_flops(ff, ff.d_model)) / 2
    else:
      arrays = param_shapes(messages)["aggregate"]
      more = sum(a.size for name, a in arrays.items() if name != "scale_LD")
    matrices = getattr(ff.experts.function, "matrices", 3)
    width = round(more / (matrices * ff.d_model))
    return dataclasses.replace(ff, shared=ff.experts.replace(d_ff=max(1, width)))

  return dataclasses.replace(run, model=_layers(run.model, change))


def _rounds(name: str, value: str | None, kinds: dict[str, str]) -> tuple[int, str]:
  """(rounds of messages, what comes after a hyphen by its full name)."""
  number, _, kind = (value or "").partition("-")
  if not number.isdecimal() or not int(number) or kind not in kinds:
    known = ", ".join(kind for kind in kinds if kind)
    raise ValueError(
      f"--arms {name}={value}: give the number of rounds, >= 1, and perhaps one of "
      f"{known} after a hyphen."
    )
  return int(number), kinds[kind]


def _steps(run: Run, value: str | None) -> Run:
  try:
    share = float(value or "")
  except ValueError:
    share = 0.0
  if not 0 < share < math.inf or round(share * run.steps) < 1:
    raise ValueError(
      f"--arms steps={value}: give a share of the run's {run.steps} steps, as in 0.5."
    )
  return dataclasses.replace(run, steps=round(share * run.steps))


def _balance(run: Run, value: str | None) -> Run:
  without = tuple(p for p in run.loss_weights if not p[0].startswith(_LOSS))
  if value == "none":
    return dataclasses.replace(run, loss_weights=without)
  if value == "loss":
    if without == run.loss_weights:
      raise ValueError(f"--arms balance=loss: the run weighs no loss named {_LOSS!r}.")
    return run
  if value == "bias":
    model = _layers(
      run.model,
      lambda ff: dataclasses.replace(ff, balance=use(balance.update, rate=1e-3)),
    )
    return dataclasses.replace(run, model=model, loss_weights=without)
  if value == "sequence":
    weight = [w for name, w in run.loss_weights if name.startswith(_LOSS)]
    if len(weight) != 1:
      raise ValueError(
        f"--arms balance=sequence: the run weighs {len(weight)} losses of {_LOSS!r}, "
        "not one."
      )
    model = _layers(run.model, _by_sequence)
    weights = (*without, (f"{_LOSS}_sequence", weight[0]))
    # Both at once: the weights name what the layers report.
    return dataclasses.replace(run, model=model, loss_weights=weights)
  raise ValueError(f"--arms balance={value}: give none, loss, bias or sequence.")


def _by_sequence(ff: MoEConfig) -> MoEConfig:
  own = use(losses.load_balance, over="sequence")
  changed = tuple(own if loss.name == _LOSS else loss for loss in ff.losses)
  return dataclasses.replace(ff, losses=changed)


def _pool(run: Run, value: str | None) -> Run:
  if value != "none" and not (value or "").removesuffix("+").isdecimal():
    raise ValueError(
      f"--arms pool={value}: give none, a number of experts, or a number and + for "
      "pools of that many or more."
    )

  def change(ff: MoEConfig) -> MoEConfig:
    own = [rule for rule in ff.restrict if rule.function is restrict.document_pool]
    if not own:
      raise ValueError(
        f"--arms pool={value}: the run has no document_pool; use --config emo."
      )
    others = tuple(rule for rule in ff.restrict if rule not in own)
    if value == "none":
      return dataclasses.replace(ff, restrict=others)
    size = int((value or "").removesuffix("+"))
    most = None if (value or "").endswith("+") else size
    return dataclasses.replace(
      ff, restrict=(*others, own[0].replace(least=size, most=most))
    )

  return dataclasses.replace(run, model=_layers(run.model, change))


def _layers(
  model: ModelConfig, change: Callable[[MoEConfig], MoEConfig]
) -> ModelConfig:
  """A model with each sparse layer changed."""

  def block(block: BlockConfig) -> BlockConfig:
    if isinstance(block.ff, Dense):
      return block
    return dataclasses.replace(block, ff=change(block.ff))

  segments = tuple(
    (tuple(block(b) for b in blocks), repeat) for blocks, repeat in model.segments
  )
  return dataclasses.replace(model, segments=segments)


def _no_value(name: str, value: str | None) -> None:
  if value is not None:
    raise ValueError(f"--arms {name}={value}: {name} takes no value.")


_ARMS: dict[str, Callable[[Run, str | None], Run]] = {
  "sparse": _sparse,
  "dense": _dense,
  "experts": _experts,
  "finer": _finer,
  "dag": _dag,
  "shared": _shared,
  "steps": _steps,
  "balance": _balance,
  "pool": _pool,
}
