"""A sparse model whose experts are copies of a dense one's feed-forwards.

  python -m experiments.surgery upcycle --workdir runs/dense --experts 8 --k 2 \
      --out runs/upcycled

With renormalised weights and nothing drawn the new model says what the old one did
(sparse upcycling, arXiv 2212.05055).  --granularity cuts copies into narrower experts;
--reinit begins a share of each expert's hidden units anew (Drop-Upcycling, arXiv
2502.19261).  The optimizer begins anew.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

from experiments.operations._several import LOSS_WEIGHTS, count, numbers


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--experts", required=True, type=count, metavar="E")
  add("--k", type=count, default=2, help="experts of a token; 2 if not given")
  add(
    "--blocks",
    type=numbers,
    metavar="N,N,...",
    help="from 0; every dense one if not given",
  )
  add("--granularity", type=count, default=1, metavar="G")
  add("--noise", type=float, default=0.0, help="share of the weights' deviation")
  add("--reinit", type=float, default=0.0, help="share of hidden units")
  add("--plain-weights", action="store_true", help="not renormalised")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The sparse model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import layers, upcycle

  made = upcycle.upcycle(
    source.model,
    num_experts=arguments.experts,
    k=arguments.k,
    seed=arguments.seed,
    blocks_changed=arguments.blocks,
    renormalised=not arguments.plain_weights,
    granularity=arguments.granularity,
    noise=arguments.noise,
    reinit=arguments.reinit,
  )
  kept = [["the dense feed-forward"] * arguments.experts for _ in layers(made)]
  # A dense run balances nothing.
  settings = () if source.run.loss_weights else (LOSS_WEIGHTS,)
  why = "a dense layer has become experts (as the paper does for language)"
  return Outcome(made, kept, settings=settings, moments=why)
