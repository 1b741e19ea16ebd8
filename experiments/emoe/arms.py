"""What is compared, as parameters and settings of one program or another.

Arms of one shape differ in data alone: which hidden unit is in which group, whether
the highest or the lowest scores are chosen, whether the means follow the keys.  So they
share a compiled program.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.errors import BadConfig
from jmoe import dispatch
from jmoe.config import MoEConfig
from jmoe.surgery import encoders
from jmoe.surgery.encoders import EncoderModel
from jmoe.use import nearest, use


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

  model: EncoderModel
  orders: dict[int, np.ndarray]  # none of a dense one
  sign: float
  follow: bool


def start(
  name: str, dense: EncoderModel, *, groups: int, k: int, layers: tuple[int, ...]
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
  """
  if name not in ARMS:
    raise BadConfig(f"--arms {name}; {nearest(name, ARMS)}")
  arm = ARMS[name]
  if arm.partition is None:
    return Start(dense, {}, arm.sign, False)
  found = encoders.grouped(
    dense,
    num_experts=groups,
    k=groups - k if arm.rest else k,
    layers_changed=layers,
    partition=arm.partition,
    gate=arm.gate,
  )
  model = masked(found.model)
  if arm.sign < 0:
    state = {n: arm.sign * np.asarray(x) for n, x in model.state.items()}
    model = model._replace(state=state)
  return Start(model, found.orders, arm.sign, arm.follow)


def masked(model: EncoderModel) -> EncoderModel:
  """The same with hidden units masked where they are: plain products under vmap."""
  ffs = tuple(
    dataclasses.replace(ff, dispatch=use(dispatch.mask))
    if isinstance(ff, MoEConfig)
    else ff
    for ff in model.config.feed_forwards
  )
  config = dataclasses.replace(model.config, feed_forwards=ffs)
  return model._replace(config=config)


def in_groups(params: dict[str, Any], like: Start) -> tuple[dict[str, Any], dict]:
  """(parameters, state) of a dense encoder, cut where another was and masked so.

  Traceable: what was trained dense is asked how it does with a few groups.

  Args:
    params: of a dense encoder.
    like: an arm with a gate of means.
  """
  params, state = dict(params), {}
  for n, order_F in like.orders.items():
    at, ff = f"layers.{n}.", like.model.config.feed_forwards[n]
    assert isinstance(ff, MoEConfig)
    E = ff.num_experts
    up_DF = params.pop(f"{at}up.kernel").take(order_F, 1)
    up_EDF = up_DF.reshape(ff.d_model, E, -1).swapaxes(0, 1)
    down_FD = params.pop(f"{at}down.kernel").take(order_F, 0)
    bias_F = params.pop(f"{at}up.bias").take(order_F, 0)
    params |= {
      f"{at}moe.experts.up_EDF": up_EDF,
      f"{at}moe.experts.up_bias_EF": bias_F.reshape(E, -1),
      f"{at}moe.experts.down_EFD": down_FD.reshape(E, -1, ff.d_model),
      f"{at}down_bias": params.pop(f"{at}down.bias"),
    }
    state[f"{at}moe.state.gate.key_ED"] = like.sign * up_EDF.mean(-1)
  return params, state
