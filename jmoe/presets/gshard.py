"""GShard: two experts per token, the second one by chance, in two slot rules."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, renormalise
from jmoe.config import MoEConfig
from jmoe.use import Use, use

LOSS_WEIGHTS = {"load_balance_group": 0.01}  # the paper's k is unnamed; Lingvo's value


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 2048,
  group_size: int | str | None = None,
) -> MoEConfig:
  """A GShard layer by the paper's algorithm 1.

  Lepikhin et al. 2020, arXiv 2006.16468, section 2.2.  A group of S tokens has
  C = 2S/E slots per expert; weights are divided by their pair's sum before capacity; a
  second choice is kept with probability min(1, 2 * g2) and takes up a place in the
  queue even when it is not.  The loss counts first choices and is E^2 times the
  paper's, which is 1/E^2 at balance.  Section 4: 128, 512 or 2048 experts, one a
  device; every second block.

  Left out by the paper: rounding of C (here up), evaluation (here the second choice is
  always kept), d_model 1024 and d_ff 8192 (from later tables).
  """
  return _layer(
    d_model,
    d_ff,
    num_experts,
    group_size,
    capacity=use(capacity.by_factor, factor=1.0),
    skipped_holds_slot=True,
  )


@spelt
def lingvo_layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 2048,
  group_size: int | str | None = None,
) -> MoEConfig:
  """The same by Lingvo's code (`core/gshard_layers.py`), in its default mode.

  A skipped second choice leaves its place to the next; slots are 2S/E rounded down,
  then up to a multiple of 4.
  """
  return _layer(
    d_model,
    d_ff,
    num_experts,
    group_size,
    capacity=use(capacity.by_factor, factor=2.0, rule=capacity.lingvo),
    skipped_holds_slot=False,
  )


def _layer(
  d_model: int,
  d_ff: int,
  num_experts: int,
  group_size: int | str | None,
  *,
  capacity: Use,
  skipped_holds_slot: bool,
) -> MoEConfig:
  return MoEConfig(
    d_model,
    num_experts,
    router=use(
      routers.top_2,
      policy="random",
      threshold=0.5,
      skipped_holds_slot=skipped_holds_slot,
    ),
    group_size=group_size,
    capacity=capacity,
    renormalise=use(renormalise.before_dropping),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.relu),
    losses=(use(losses.load_balance, choices="first", over="group"),),
  )
