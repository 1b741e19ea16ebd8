"""What is compared: functions from a run to the same run with one thing changed.

An arm is a name, or `name=value`:

  sparse        the run as it is
  dense         the dense model of equal active FLOPs
  experts=N     N experts of the same active FLOPs; one expert is a dense layer
  steps=F       the run as it is, planned to end after a share F of its steps
  balance=none  no balancing at all
  balance=loss  by the load-balance loss that the run has
  balance=bias  by DeepSeek-V3's bias instead of the loss
  balance=sequence  by the loss within each row instead of over all of them
  pool=none     without EMO's pools of documents, and all else as it was
  pool=N        pools of N experts for every document
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math
from collections.abc import Callable

from experiments.config import Run
from jmoe import balance, losses, restrict
from jmoe.analysis import cost
from jmoe.config import BlockConfig, Dense, ModelConfig, MoEConfig
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
  if value != "none" and not (value or "").isdecimal():
    raise ValueError(f"--arms pool={value}: give none, or a number of experts.")

  def change(ff: MoEConfig) -> MoEConfig:
    own = [rule for rule in ff.restrict if rule.function is restrict.document_pool]
    if not own:
      raise ValueError(
        f"--arms pool={value}: the run has no document_pool; use --config emo."
      )
    others = tuple(rule for rule in ff.restrict if rule not in own)
    if value == "none":
      return dataclasses.replace(ff, restrict=others)
    size = int(value or 0)
    fixed = own[0].replace(least=size, most=size)
    return dataclasses.replace(ff, restrict=(*others, fixed))

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
  "steps": _steps,
  "balance": _balance,
  "pool": _pool,
}
