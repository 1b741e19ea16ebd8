"""Fewer experts, chosen by what they do on training text.

  python -m experiments.surgery prune --workdir runs/small --keep 8 --score reap \
      --domain code --out runs/pruned

`reap` keeps those whose weighted outputs are largest (arXiv 2510.13999), `frequency`
those that are taken most (arXiv 2109.10465), `random` any.  --uneven compares experts
of all layers, which then keep --keep on average.  --domain may be given more than once;
all domains of the corpus if it is not.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import functools
from typing import Any

from experiments.operations._several import calibration_rows, check_sparse, count


def arguments(add: Any) -> None:
  """Its own arguments."""
  add("--keep", required=True, type=count, metavar="N", help="experts a layer")
  add("--score", choices=("reap", "frequency", "random"), default="reap")
  add("--uneven", action="store_true")
  add("--domain", action="append", metavar="NAME", help="of the run's corpus")
  add("--documents", type=count, default=16, metavar="N", help="of each domain")


def operate(source: Any, arguments: argparse.Namespace) -> Any:
  """The smaller model."""
  from experiments.operations._source import Outcome
  from jmoe.surgery import cut_model, prune

  check_sparse(source)
  if arguments.score == "random":
    scores = prune.at_random(source.model, seed=arguments.seed)
  else:
    rows = [
      each
      for name in arguments.domain or source.texts.domains
      for each in calibration_rows(source, arguments, name)
    ]
    score = prune.by_reap if arguments.score == "reap" else prune.by_frequency
    scores = score(source.model, rows)
  kept = prune.choose(
    scores,
    keep=arguments.keep,
    uniform=not arguments.uneven,
    at_least=min(layer_k(source.model), arguments.keep),
  )
  made = cut_model(source.model, kept)
  return Outcome(
    made,
    kept,
    {"scores": [score_E.tolist() for score_E in scores]},
    moments=functools.partial(cut_model, kept=kept),
    origins=kept,
  )


def layer_k(model: Any) -> int:
  """The most experts that a token takes in a layer."""
  from jmoe.surgery import layers

  return max((layer.config.k or 1 for layer in layers(model)), default=1)
