"""The 1.1T language model of fairseq: two experts, weights made to sum after drops."""
# SPDX-License-Identifier: Apache-2.0

import jax

from jmoe import dispatch, experts, losses, routers
from jmoe._spelling import spelt
from jmoe.assign import capacity, renormalise
from jmoe.config import MoEConfig
from jmoe.use import use

LOSS_WEIGHTS = {"load_balance": 0.01}


@spelt
def layer(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int = 512,
  policy: str = "sampling",
  eval_fraction: float = 0.25,
) -> MoEConfig:
  """A fairseq layer.

  Artetxe et al. 2021, arXiv 2112.10684, section 2 and table 1: 15B d_model 768, d_ff
  3072; 52B 1024, 4096; 207B 2048, 8192; 1.1T 4096, 16384; 512 experts, every second
  block.

  Left out by the paper, taken from the code (`fairseq/modules/moe/top2gate.py`, branch
  `moe`): 2 * ceil(T/E) slots in training and a fraction of all tokens in evaluation,
  whatever E; weights divided by the sum of those that found a slot; the second expert
  drawn by Gumbel noise, in evaluation too.  That is the class's default; the training
  command in its documentation says "all".

  Args:
    d_model, d_ff, num_experts: sizes.
    policy: of the second expert, see `routers.top_2`.
    eval_fraction: slots in evaluation, as a fraction of the tokens.
  """
  return MoEConfig(
    d_model,
    num_experts,
    router=use(routers.top_2, policy=policy, eval_policy=policy, compare="raw"),
    capacity=use(
      capacity.by_factor,
      factor=1.0,
      eval_factor=eval_fraction,
      rule=capacity.fairseq,
      eval_rule=capacity.fairseq_eval,
    ),
    renormalise=use(renormalise.after_dropping),
    dispatch=use(dispatch.buckets),
    experts=use(experts.mlp, d_ff=d_ff, activation=jax.nn.gelu, bias=True),
    losses=(use(losses.load_balance, choices="first"),),
  )
