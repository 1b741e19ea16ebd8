"""What is compared, as parameters and settings of one program or another.

Arms of one shape differ in data alone: which hidden unit is in which group, whether
the highest or the lowest scores are chosen, whether the means follow the keys.  So they
share a compiled program.
"""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.emoe import kinds
from experiments.errors import BadConfig
from jmoe.surgery import Model
from jmoe.surgery.encoders import EncoderModel
from jmoe.use import nearest


class Arm(NamedTuple):
  """How an arm trains."""

  partition: str | None = "keys"  # None: dense
  gate: str = "frozen"  # of `surgery.cluster`
  sign: float = 1.0  # -1: the lowest scores are chosen
  follow: bool = True  # the means are taken anew after each step
  rest: bool = False  # all groups but k


ARMS = {
  "dense": Arm(None),
  "emoe": Arm(),
  "frozen": Arm(follow=False),
  "random": Arm("random"),
  "bottom": Arm(sign=-1.0),
  "not-top": Arm(sign=-1.0, rest=True),
  "learned": Arm(gate="cosine", follow=False),
}


class Start(NamedTuple):
  """A model before its fine-tuning."""

  model: Any  # as the one that was given
  orders: kinds.Orders  # none of a dense one
  sign: float
  follow: bool
  dense: kinds.Config  # of the model that it was


def start(
  name: str,
  dense: EncoderModel | Model,
  *,
  groups: int,
  k: int,
  layers: tuple[int, ...],
) -> Start:
  """The model of an arm.

  Args:
    name: of ARMS.
    dense: pretrained.
    groups: N.
    k: groups of a token.
    layers: that are cut into groups.

  Raises:
    BadConfig: no such arm.
    ValueError: groups that do not fit, or layers that are not there.
  """
  if name not in ARMS:
    raise BadConfig(f"--arms {name}; {nearest(name, ARMS)}")
  arm = ARMS[name]
  if arm.partition is None:
    return Start(dense, {}, arm.sign, False, dense.config)
  model, orders = kinds.of(dense.config).grouped(
    dense,
    groups=groups,
    k=groups - k if arm.rest else k,
    layers=layers,
    partition=arm.partition,
    gate=arm.gate,
  )
  if arm.sign < 0:
    state = {n: arm.sign * np.asarray(x) for n, x in model.state.items()}
    model = model._replace(state=state)
  return Start(model, orders, arm.sign, arm.follow, dense.config)


def joined(params: Mapping[str, Any], begun: Start) -> dict[str, Any]:
  """Parameters of an arm in groups as those of a dense model; traceable."""
  model = begun.model._replace(params=params)
  return kinds.of(begun.dense).joined(model, begun.orders, begun.dense)


def in_groups(
  params: Mapping[str, Any], like: Start
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(parameters, state) of a dense model, cut where another was and masked so.

  Traceable: what was trained dense is asked how it does with a few groups.

  Args:
    params: of a dense model.
    like: an arm with a gate of means.
  """
  kind = kinds.of(like.dense)
  params, state = kind.cut(params, like.model, like.orders, like.dense)
  return params, {name: like.sign * x for name, x in state.items()}
