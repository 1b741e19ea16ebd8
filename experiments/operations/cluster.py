"""Dense feed-forwards cut into groups of hidden units, of which a token takes some.

  python -m experiments.surgery cluster --workdir runs/dense --experts 64 --k 16 \
      --blocks 10 --out runs/emoe

EMoE (arXiv 2310.10908): input weights of hidden units are clustered into groups of one
size; chosen groups weigh one, scored by the means of their keys, which follow the keys
from step to step unless --gate frozen.  --gate linear or cosine is trained from there,
and balanced with the weight of `presets.emoe` if the run weighs no loss.
--partition random is a control.  The receipt has where each hidden unit was.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.operations._several import count, numbers


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--experts", required=True, type=count, metavar="N")
  add("--k", required=True, type=count, help="groups of a token")
  add("--blocks", required=True, type=numbers, metavar="N,N,...", help="from 0")
  add("--partition", choices=("keys", "random"), default="keys")
  add("--gate", choices=("keys", "frozen", "linear", "cosine"), default="keys")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The model in groups."""
  from experiments.operations._source import Outcome
  from jmoe.presets import emoe
  from jmoe.surgery import cluster

  made = cluster.cluster(
    source.model,
    num_experts=arguments.experts,
    k=arguments.k,
    blocks_changed=arguments.blocks,
    seed=arguments.seed,
    partition=arguments.partition,
    gate=arguments.gate,
  )
  learned = arguments.gate in ("linear", "cosine")
  # A dense run balances nothing.
  weights = tuple(emoe.LEARNED_LOSS_WEIGHTS.items())
  balance = learned and not source.run.loss_weights
  return Outcome(
    made.model,
    [order_F.tolist() for order_F in made.orders],
    settings=(f"loss_weights={weights}",) if balance else (),
    moments="hidden units of a dense layer are experts of a sparse one",
  )
