"""EMoE: a dense feed-forward's hidden units in groups, of which a token takes some."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import jax

from jmoe import dispatch, experts, gates, losses, noise, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, priority, renormalise
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {}  # of `layer`, whose gate learns nothing
LEARNED_LOSS_WEIGHTS = {"load_balance": 0.01}  # ours; the paper gives none
RELEASED_LOSS_WEIGHTS = {"importance": 0.005, "load": 0.005}  # half each of 0.01


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  k: int = 16,
  refresh: bool = True,
  gated: bool = False,
  activation: Callable[..., Any] = jax.nn.gelu,
  bias: bool | str = False,
) -> MoEConfig:
  """A layer of groups; `surgery.cluster` fills it from a dense feed-forward.

  Qiu, Huang, Fu 2024, arXiv 2310.10908: 64 groups for BERT, GPT-2 and Llama-7B, and
  16, 32 or 48 of them a token (Llama: 16); a group's score is the token times the mean
  of its keys, which the optimizer does not see and which is taken anew after every
  step; chosen groups weigh one.  Nothing is dropped and no loss balances, as in the
  paper's formulas; `released_layer` has what its code does beside.

  With `dataclasses.replace(layer, dispatch=use(dispatch.mask))` no rows are moved.

  Args:
    d_model: width.
    d_ff: of one group: the dense width over `num_experts`.
    num_experts: N, groups.
    k: groups of a token.
    refresh: False: the means stay as they were at first.
    gated: GLU, whose keys are of the gate projection.
    activation: of the dense feed-forward.
    bias: of the experts; "hidden" before the activation alone.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.keys, refresh=refresh),
    router=use(routers.top_k, k=k),
    renormalise=use(renormalise.ones),
    dispatch=use(dispatch.sort),
    experts=use(
      experts.glu if gated else experts.mlp,
      d_ff=d_ff,
      activation=activation,
      bias=bias,
    ),
    losses=(),
  )


@spelt
def learned_layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  k: int = 16,
  gate: Use = use(gates.cosine),
  scale: float | None = None,
  gated: bool = False,
  activation: Callable[..., Any] = jax.nn.gelu,
  bias: bool | str = False,
) -> MoEConfig:
  """EMoE-learn: the same groups under a gate that is trained, here from the averages.

  The paper's router is cosine, its weights a softmax over the chosen groups, which
  multiply their outputs, and balance matters.  What such weights sum to is not said:
  with 1, groups that began as parts of one feed-forward begin with a k-th of their
  output, so here it is k unless `scale` says otherwise.

  Args:
    gate: `gates.cosine` or `gates.linear`.
    scale: sum of a token's weights; None: k.

  The others are those of `layer`.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=gate,
    router=use(routers.top_k, k=k, scale=float(k) if scale is None else scale),
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.sort),
    experts=use(
      experts.glu if gated else experts.mlp,
      d_ff=d_ff,
      activation=activation,
      bias=bias,
    ),
    losses=(use(losses.load_balance),),
  )


@spelt
def released_layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 64,
  k: int = 16,
  refresh: bool = True,
  activation: Callable[..., Any] = jax.nn.gelu,
) -> MoEConfig:
  """What the released code adds without a word in the paper.

  Noise N(0, 1/N^2) on the scores in training, capacity 1.5 in order of the scores, so
  that assignments beyond it are dropped and all groups are no longer the dense
  feed-forward, and importance and load losses of 0.01, which reach the tokens alone.

  Arguments are those of `layer`.
  """
  return MoEConfig(
    d_model,
    num_experts,
    gate=use(gates.keys, refresh=refresh),
    logit_noise=use(noise.gaussian),
    router=use(routers.top_k, k=k),
    priority=use(priority.by_confidence),
    capacity=use(capacity.by_factor, factor=1.5, rule=capacity.tutel),
    renormalise=use(renormalise.ones),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=activation, bias=True),
    losses=(use(losses.importance), use(losses.load)),
  )
