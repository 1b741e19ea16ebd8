"""Several copies of each expert, and as many times the choices.

  python -m experiments.surgery expand --workdir runs/small --times 2 --out runs/wide

Without --noise the new model says what the old one did.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import functools
from typing import Any

from experiments.operations._several import check_sparse, count


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--times", required=True, type=count, metavar="M", help="copies of each expert")
  add("--k", type=count, help="experts of a token; M times as many if not given")
  add("--noise", type=float, default=0.0, help="share of the weights' deviation")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The wider model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import layers, upcycle

  check_sparse(source)
  made = upcycle.expand(
    source.model,
    times=arguments.times,
    k=arguments.k,
    seed=arguments.seed,
    noise=arguments.noise,
  )
  kept = [
    [e // arguments.times for e in range(layer.config.num_experts)]
    for layer in layers(made)
  ]
  copied = functools.partial(upcycle.expand, times=arguments.times, k=arguments.k)
  moments = "--noise moved it" if arguments.noise else copied
  return Outcome(made, kept, moments=moments, origins=kept)
